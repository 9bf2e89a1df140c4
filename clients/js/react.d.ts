import type { Context } from "react";
import type { BrokerEvent, Client, ClientOptions, State, SubscribeOptions, SubscriptionState } from "./wsbroker.js";

/** The client of the components below. */
export declare const ClientContext: Context<Client | null>;

/** The client of the context and its state; or with a `url` one that lives as long as the component. */
export declare function useClient(url?: string, options?: ClientOptions): { client: Client | null; state: State };

export interface TopicOptions<T> extends SubscribeOptions {
  client?: Client | null;
  onEvent?: (event: BrokerEvent<T>) => void;
}

/** The newest event of a topic or pattern, and how many events were missed. */
export declare function useTopic<T = any>(
  topic: string,
  options?: TopicOptions<T>,
): {
  event: BrokerEvent<T> | null;
  data: T | undefined;
  missed: number;
  state: SubscriptionState;
  error: Error | null;
};

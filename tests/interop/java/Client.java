// Java's own client, java.net.http, step by step: `java Client URL TOPIC`. It does not compress.
// It prints the lines that tests/interop/python/steps.py describes. Java has no JSON: messages are compared as texts.

import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.WebSocket;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CompletionStage;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.concurrent.TimeUnit;
import java.util.function.Predicate;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

public final class Client implements WebSocket.Listener {
    /** Seconds that a step may take. Far more than any needs, also on a busy machine. */
    private static final int PATIENCE = 20;

    private static final String SMALL = "{\"bid\":1.0843,\"name\":\"Zürich 🚀\"}";

    /** Characters of the fragmented event: more than the write buffer of a library. */
    private static final int FRAGMENTED = 30_000;

    private final BlockingQueue<String> messages = new LinkedBlockingQueue<>();
    private final List<String> early = new ArrayList<>();
    private final CompletableFuture<Integer> closed = new CompletableFuture<>();
    private final StringBuilder text = new StringBuilder();
    private String step = "connect";

    public static void main(String[] arguments) {
        System.out.println("version " + System.getProperty("java.version"));
        Client client = new Client();
        try {
            client.run(URI.create(arguments[0]), arguments[1]);
        } catch (Exception error) {
            Throwable cause = error.getCause() == null ? error : error.getCause();
            System.out.println("failed " + client.step + ": " + cause.toString().replace("\n", " "));
        }
        System.exit(0);
    }

    private void run(URI url, String topic) throws Exception {
        WebSocket socket = HttpClient.newHttpClient().newWebSocketBuilder().subprotocols("wsbroker.v1")
                .buildAsync(url, this).get(PATIENCE, TimeUnit.SECONDS);
        String welcome = message(found -> true);
        check(welcome.startsWith("{\"op\":\"welcome\",\"version\":1,"), "no welcome, but " + welcome);
        System.out.println("ok connect");

        step = "subscribe";
        send(socket, "{\"op\":\"subscribe\",\"id\":1,\"topic\":\"" + topic + "\"}", true);
        same(answer(1), "{\"op\":\"ok\",\"id\":1,\"topic\":\"" + topic + "\"}");
        System.out.println("ok subscribe");

        step = "publish";
        send(socket, publish(2, topic, SMALL), true);
        same(answer(2), "{\"op\":\"ok\",\"id\":2,\"receivers\":1,\"queued\":0,\"dropped\":0}");
        System.out.println("ok publish");

        step = "receive";
        same(event(), "{\"op\":\"event\",\"topic\":\"" + topic + "\",\"data\":" + SMALL + "}");
        System.out.println("ok receive");

        step = "large";
        Matcher size = Pattern.compile("\"max_size\":(\\d+)").matcher(welcome);
        check(size.find(), "no max_size in " + welcome);
        String large = numbers(Integer.parseInt(size.group(1)) - publish(3, topic, "\"\"").length());
        send(socket, publish(3, topic, large), true);
        same(event(), "{\"op\":\"event\",\"topic\":\"" + topic + "\",\"data\":" + large + "}");
        System.out.println("ok large");

        step = "fragments";
        String fragmented = numbers(FRAGMENTED);
        String command = publish(4, topic, fragmented);
        send(socket, command.substring(0, 10_000), false);
        send(socket, command.substring(10_000, 20_000), false);
        send(socket, command.substring(20_000), true);
        same(event(), "{\"op\":\"event\",\"topic\":\"" + topic + "\",\"data\":" + fragmented + "}");
        System.out.println("ok fragments");

        step = "close";
        socket.sendClose(WebSocket.NORMAL_CLOSURE, "").get(PATIENCE, TimeUnit.SECONDS);
        System.out.println("ok close " + closed.get(PATIENCE, TimeUnit.SECONDS));
    }

    @Override
    public CompletionStage<?> onText(WebSocket socket, CharSequence part, boolean last) {
        text.append(part);
        if (last) {
            messages.add(text.toString());
            text.setLength(0);
        }
        socket.request(1);
        return null;
    }

    @Override
    public CompletionStage<?> onClose(WebSocket socket, int code, String reason) {
        closed.complete(code);
        return null;
    }

    @Override
    public void onError(WebSocket socket, Throwable error) {
        closed.completeExceptionally(error);
    }

    /** Waits for the first message that fits. An error fails the step. */
    private String message(Predicate<String> fits) throws Exception {
        for (String found : early) {
            if (fits.test(found)) {
                early.remove(found);
                return found;
            }
        }
        while (true) {
            String found = messages.poll(PATIENCE, TimeUnit.SECONDS);
            check(found != null, "nothing came");
            if (fits.test(found)) {
                return found;
            }
            check(!found.startsWith("{\"op\":\"error\""), "an error came: " + found);
            early.add(found);
        }
    }

    private String answer(int id) throws Exception {
        return message(found -> found.startsWith("{\"op\":\"ok\",\"id\":" + id + ","));
    }

    private String event() throws Exception {
        return message(found -> found.startsWith("{\"op\":\"event\","));
    }

    private static void send(WebSocket socket, String part, boolean last) throws Exception {
        socket.sendText(part, last).get(PATIENCE, TimeUnit.SECONDS);
    }

    private static String publish(int id, String topic, String data) {
        return "{\"op\":\"publish\",\"id\":" + id + ",\"topic\":\"" + topic + "\",\"data\":" + data + "}";
    }

    /** A JSON string with a text of this length which compression makes smaller, but not small: 0 1 2 3 … */
    private static String numbers(int length) {
        StringBuilder text = new StringBuilder();
        for (int number = 0; text.length() < length; number++) {
            text.append(number).append(' ');
        }
        return '"' + text.substring(0, length) + '"';
    }

    private static void same(String found, String expected) {
        check(found.equals(expected), "another message came: " + found.substring(0, Math.min(200, found.length())));
    }

    private static void check(boolean holds, String otherwise) {
        if (!holds) {
            throw new IllegalStateException(otherwise);
        }
    }
}

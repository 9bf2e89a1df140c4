/** A page of the chat: it shows the kept messages of the room, what is said from then on, and who is here. */

import { clientIn } from "../link.js";

const ROOM = "chat.lobby";
const COLOURS = ["#4a57d6", "#9a3fc0", "#b25e09", "#0b8577", "#17804b", "#1668d6", "#c6302b"];

const byId = (id) => document.getElementById(id);

/** The members by session: a person may have several pages. */
const members = new Map();

byId("enter").addEventListener("submit", async (event) => {
  event.preventDefault();
  const name = byId("name").value.trim();
  try {
    await token(name);
  } catch {
    byId("refused").textContent = "This name cannot be had: letters, digits, _ and -.";
    return;
  }
  byId("enter").hidden = true;
  byId("room").hidden = false;
  enter(name);
});

/** Asks the site for a token. A site with a login would know the name by itself. */
async function token(name) {
  const answer = await fetch(`/token?name=${encodeURIComponent(name)}`, { method: "POST" });
  if (!answer.ok) throw new Error(answer.statusText);
  return answer.text();
}

function enter(name) {
  const client = clientIn(byId("link"), { token: () => token(name) });
  client.addEventListener("state", ({ detail }) => {
    if (detail.state === "connected") queueMicrotask(() => readMembers(client).catch(console.error));
  });
  const colour = COLOURS[Math.floor(Math.random() * COLOURS.length)];
  const room = client.subscribe(ROOM, { last: 50, presence: true, info: { colour } });
  room.on("event", showMessage);
  room.on("gap", showGap);
  room.on("join", add);
  room.on("leave", remove);
  room.on("error", (error) => (byId("trouble").textContent = error.message));
  byId("say").addEventListener("submit", async (event) => {
    event.preventDefault();
    const text = byId("text").value;
    byId("text").value = "";
    try {
      const { receivers } = await client.publish(`chat.say.${name}`, { text });
      byId("trouble").textContent = receivers ? "" : "Nobody hears: start the program with python -m examples.chat";
    } catch (error) {
      byId("text").value = text;
      byId("trouble").textContent = error.message;
    }
  });
  byId("text").focus();
}

/** The members of before are not those of now. Whoever comes while they are read is told by `join`. */
async function readMembers(client) {
  members.clear();
  for await (const member of client.presence(ROOM)) add(member);
  showMembers();
}

function add({ session, identity, info }) {
  members.set(session, { name: identity, colour: info?.colour });
  showMembers();
}

function remove({ session }) {
  members.delete(session);
  showMembers();
}

function showMembers() {
  const people = new Map([...members.values()].map((member) => [member.name, member]));
  const names = [...people.keys()].sort((one, other) => one.localeCompare(other));
  byId("count").textContent = names.length;
  byId("members").replaceChildren(
    ...names.map((name) => {
      const item = element("li");
      item.append(face(name, people.get(name).colour), element("span", "", name));
      return item;
    }),
  );
}

function showMessage({ data }) {
  const item = element("li");
  const who = element("div", "who", data.name);
  const at = new Date(data.at);
  const time = element("time", "", at.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" }));
  time.dateTime = at.toISOString();
  who.append(time);
  const body = element("div");
  body.append(who, element("div", "text", data.text));
  item.append(face(data.name, [...members.values()].find((member) => member.name === data.name)?.colour), body);
  put(item);
}

function showGap({ missed }) {
  put(element("li", "gap", missed === null ? "some messages are missing" : `${missed} messages are missing`));
}

function put(item) {
  const list = byId("messages");
  const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 40;
  list.append(item);
  if (atEnd) list.scrollTop = list.scrollHeight;
}

function face(name, colour) {
  const circle = element("span", "face", [...name][0]);
  const place = [...name].reduce((sum, letter) => sum + letter.codePointAt(0), 0) % COLOURS.length;
  circle.style.setProperty("--colour", COLOURS.includes(colour) ? colour : COLOURS[place]);
  circle.setAttribute("aria-hidden", "true");
  return circle;
}

function element(kind, name = "", text = "") {
  const made = document.createElement(kind);
  if (name) made.className = name;
  made.textContent = text;
  return made;
}

// Ranking by keys or by dragging, and every click sent at once. Without this script the page's own buttons do it all.
"use strict";

// A click is sent until the server has said that it is on its disk; while there is no answer it is on the browser's disk.
let labeler, csrf, KEPT, kept, say, sending = false, leaving = false;

function count() {
  document.body.dataset.unsent = kept.length;
  if (!kept.length) localStorage.removeItem(KEPT);
}

function send(url, form, follow) {
  const fields = [...new FormData(form)].filter(([name]) => name !== "csrf" && name !== "nonce");
  kept.push({ url, fields: [...fields, ["nonce", crypto.getRandomValues(new Uint32Array(4)).join("-")]], follow });
  leaving = follow;
  count();
  flush();
}

async function flush() {
  if (sending) return;
  sending = true;
  while (kept.length) {
    const { url, fields, follow } = kept[0];
    let answer, response;
    try {
      const headers = { accept: "application/json", "x-csrf": csrf };
      const body = new URLSearchParams(fields), keepalive = body.toString().length < 60000;  // browsers allow 64 KiB
      response = await fetch(url, { method: "POST", headers, body, keepalive });
      answer = await response.json();
    } catch {
      say("The server does not answer. What you did is kept here and sent again until it does.");
      localStorage.setItem(KEPT, JSON.stringify(kept));
    }
    if (!answer || response.status === 401 || response.status === 403 || response.status === 429) {
      if (answer) say(`Not saved yet: ${answer.problem}`);
      await new Promise(resolve => setTimeout(resolve, 500));
      continue;
    }
    kept.shift();
    count();
    say(answer.problem || "");
    if (follow) leaving = Boolean(answer.next);
    if (leaving && follow) {
      location.href = answer.next;
      return;
    }
  }
  sending = false;
}

let form, cards, selected = null;

let pause;

function draft() {
  clearTimeout(pause);
  if (form && !leaving) send(form.dataset.draft, form, false);
}

function rankOf(letter) {
  return form.elements[`rank_${letter}`].value;
}

function show() {
  for (const { dataset: { letter } } of cards) {
    const rank = rankOf(letter), chip = document.querySelector(`.chip[data-letter="${letter}"]`);
    document.querySelector(`.tier[data-rank="${rank}"]`).append(chip);
    document.querySelector(`[data-place="${letter}"]`).textContent = rank ? `rank ${rank}` : "not ranked";
    const ticked = document.querySelectorAll(`[name="is_${letter}"]:checked`).length;
    document.querySelector(`#output-${letter} .ticked`).textContent = ticked ? `${ticked} ticked` : "";
  }
}

function select(letter, scroll = true) {
  selected = letter;
  for (const marked of document.querySelectorAll("[data-letter]")) marked.classList.toggle("selected", marked.dataset.letter === letter);
  const card = document.getElementById(`output-${letter}`), { top } = card.getBoundingClientRect();
  if (scroll && (top < 0 || top > innerHeight - 250)) card.scrollIntoView();
}

function set(name, value) {  // as a click on the radio button would; an empty value clears it
  const before = form.elements[name].value;
  for (const radio of form.querySelectorAll(`[name="${name}"]`)) radio.checked = radio.value === value;
  if (before === form.elements[name].value) return;
  show();
  draft();
}

function rank(letter, value) {
  set(`rank_${letter}`, value);
  const rest = cards.map(card => card.dataset.letter), at = rest.indexOf(letter);
  const next = [...rest.slice(at + 1), ...rest.slice(0, at)].find(other => !rankOf(other));
  if (value && next) select(next);
}

function move(by) {
  const at = cards.findIndex(card => card.dataset.letter === selected);
  select(cards[Math.min(Math.max(at + by, 0), cards.length - 1)].dataset.letter);
}

function open(id, inside) {
  const found = document.getElementById(id);
  found.open = !found.open;
  found.scrollIntoView({ block: "nearest" });
  if (found.open) found.querySelector(inside)?.focus();
}

function key(event) {
  const writes = event.target.matches("textarea, input[type=text]");
  if (event.key === "Enter" && form && event.target.matches("textarea") && (event.ctrlKey || event.metaKey)) return form.requestSubmit();
  if (event.key === "Escape") return document.activeElement.blur();
  if (writes || event.ctrlKey || event.metaKey || event.altKey || leaving) return false;
  const pressed = event.key.toLowerCase(), digit = event.code.match(/^(?:Digit|Numpad)(\d)$/)?.[1];
  if (pressed === "u") return document.getElementById("undo")?.click();
  if (!form) return false;
  if (pressed === "s") return open("skip", "[type=radio]");
  if (!cards.length) return false;
  if (pressed === "?") return open("keys", "summary");
  if (event.target.closest("#skip") || event.target.matches("summary, button:not(.chip)")) return false;
  if (pressed === "enter") return form.requestSubmit();
  if (digit && event.shiftKey) return digit >= 1 && digit <= 7 ? set(`rating_${selected}`, digit) : false;
  if (digit || pressed === "backspace") {
    if (digit > cards.length) return false;
    return rank(selected, +digit ? digit : "");
  }
  if (event.key.startsWith("Arrow") && event.target.matches("[type=radio]")) return false;
  if (event.key === "ArrowDown" || event.key === "ArrowUp") return move(event.key === "ArrowDown" ? 1 : -1);
  if (cards.some(card => card.dataset.letter === pressed.toUpperCase())) return select(pressed.toUpperCase());
  const tick = document.querySelector(`#output-${selected} [data-key="${CSS.escape(pressed)}"]`);
  if (!tick) return false;
  tick.closest("details").open = true;
  return tick.click();
}

function drag(chip) {
  let start = null;
  const tierAt = event => document.elementsFromPoint(event.clientX, event.clientY).find(found => found.matches(".tier"));
  const over = tier => document.querySelectorAll(".tier").forEach(each => each.classList.toggle("over", each === tier));
  const end = () => {
    start = null;
    chip.classList.remove("dragged");
    chip.style.transform = "";
    over(null);
  };
  chip.addEventListener("pointerdown", event => {
    start = [event.clientX, event.clientY];
    chip.setPointerCapture(event.pointerId);
    select(chip.dataset.letter, false);
  });
  chip.addEventListener("pointermove", event => {
    if (!start) return;
    chip.classList.add("dragged");
    chip.style.transform = `translate(${event.clientX - start[0]}px, ${event.clientY - start[1]}px)`;
    over(tierAt(event));
  });
  chip.addEventListener("pointerup", event => {
    const tier = start && tierAt(event), dragged = chip.classList.contains("dragged");
    end();
    if (!dragged) select(chip.dataset.letter);
    else if (tier) set(`rank_${chip.dataset.letter}`, tier.dataset.rank);
  });
  chip.addEventListener("pointercancel", end);
}

function begin() {
  for (const sent of document.querySelectorAll("form[data-send]"))
    sent.addEventListener("submit", event => {
      event.preventDefault();
      if (!leaving) send(sent.action, sent, true);
    });
  if (!form) return;
  form.addEventListener("input", event => {
    clearTimeout(pause);
    if (event.target.matches("textarea")) pause = setTimeout(draft, 150);
  });
  if (!cards.length) return;
  document.querySelector(".tiers").hidden = false;
  for (const card of cards) {
    const chip = document.createElement("button");
    chip.type = "button";
    chip.className = "chip";
    chip.textContent = chip.dataset.letter = card.dataset.letter;
    document.querySelector('.tier[data-rank=""]').append(chip);
    drag(chip);
    card.addEventListener("pointerdown", () => select(card.dataset.letter, false));
  }
  form.addEventListener("change", event => {
    show();
    if (!event.target.matches("textarea")) draft();
  });
  show();
  select((cards.find(card => !rankOf(card.dataset.letter)) || cards[0]).dataset.letter, false);
}

let ready = false;
const early = [];  // keys that are pressed while the page is still being read

document.addEventListener("keydown", event => {
  if (!ready) early.push(event);
  else if (key(event) !== false) event.preventDefault();
});

document.addEventListener("DOMContentLoaded", () => {
  ({ labeler, csrf } = document.body.dataset);
  if (!labeler) return;
  KEPT = `clicks of ${labeler}`;
  kept = JSON.parse(localStorage.getItem(KEPT) || "[]");
  const late = kept.length, status = document.getElementById("status");
  say = text => Object.assign(status, { textContent: text, hidden: !text });
  form = document.getElementById("answer");
  cards = [...document.querySelectorAll(".card")];
  begin();
  count();
  leaving = late > 0;  // clicks of a browser that was closed before they arrived: this page does not show them yet
  ready = true;
  early.forEach(key);
  flush().then(() => late && location.reload());
});

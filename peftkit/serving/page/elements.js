"use strict";
// Elements from values. What is shown comes from strangers, so it becomes text and never HTML; the page's policy
// (Trusted Types) forbids the rest.

// Control characters and overrides of direction; joiners change no order and hide nothing (emoji, Persian, Indic).
const STEERING = /(?![\n\t\u200c\u200d])[\p{Cc}\p{Cf}\p{Cs}]/gu;

function clean(text) {
  return String(text).replace(STEERING, "\ufffd");
}

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
  }
  fill(made, children);
  return made;
}

function fill(parent, children) {
  for (const child of children.flat(Infinity)) {
    if (child instanceof Node) parent.append(child);
    else if (child !== null && child !== undefined && child !== false) parent.append(clean(child));
  }
}

function replace(parent, ...children) {
  parent.replaceChildren();
  fill(parent, children);
}

function byId(id) {
  return document.getElementById(id);
}

function announce(text) {
  byId("announced").textContent = clean(text);
}

function say(place, text, kind = "good") {
  place.className = `said ${kind}`;
  place.textContent = clean(text);
}

function button(text, act, attributes) {
  return element("button", { type: "button", click: act, ...attributes }, text);
}

// A table that stands as a list on a phone, each value with the name of its column; empty columns are left out.
function table(caption, columns, rows) {
  const empty = (value) => value === null || value === undefined || value === "";
  const used = columns.map((_, index) => rows.some((cells) => !empty(cells[index])));
  if (!used.every(Boolean)) {
    const kept = (cells) => cells.filter((_, index) => used[index]);
    return table(caption, kept(columns), rows.map(kept));
  }
  const heads = columns.map((column) => element("th", { scope: "col" }, column));
  const lines = rows.map((cells) =>
    element("tr", null, cells.map((cell, index) =>
      index === 0
        ? element("th", { scope: "row" }, cell)
        : element("td", { "data-label": empty(cell) ? null : columns[index] }, cell))));
  return element("table", { class: "stacked" },
    element("caption", { class: "unseen" }, caption),
    element("thead", null, element("tr", null, heads)),
    element("tbody", null, lines));
}

function facts(pairs) {
  const known = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return element("dl", null, known.flatMap(([name, value]) => [element("dt", null, name), element("dd", null, value)]));
}

function mono(text) {
  return element("span", { class: "mono" }, text);
}

function minute(time) {
  const moment = new Date(typeof time === "number" ? time * 1000 : time);
  if (Number.isNaN(moment.getTime())) return "";
  const two = (number) => String(number).padStart(2, "0");
  const day = `${moment.getFullYear()}-${two(moment.getMonth() + 1)}-${two(moment.getDate())}`;
  return `${day} ${two(moment.getHours())}:${two(moment.getMinutes())}`;
}

function count(number, one, many = `${one}s`) {
  return `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
}

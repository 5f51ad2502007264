// One prompt to several models at once, each answer in a column of its own.

const compare = { columns: [], prompts: [], known: [] };

function chosenModels() {
  return Array.from(byId("models").querySelectorAll("input:checked"), (box) => box.value);
}

// The base and the first adapters are chosen at first; a later change leaves what was chosen as it was.
function drawModels(base, adapters) {
  const chosen = new Set(chosenModels());
  const first = compare.known.length === 0;
  const models = [base, ...adapters];
  const boxes = models.map((model, index) => {
    const box = element("input", { type: "checkbox", value: model });
    box.checked = first ? index < 4 : chosen.has(model) || !compare.known.includes(model);
    return element("label", null, box, index === 0 ? "base" : model);
  });
  compare.known = models;
  replace(byId("models"), boxes);
}

function nameOf(model) {
  return model === compare.known[0] ? "base" : model;
}

function startCompare() {
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  byId("stop").addEventListener("click", stop);
  byId("against").addEventListener("change", drawDifferences);
  byId("earlier").addEventListener("change", () => {
    const found = compare.prompts[Number(byId("earlier").value)];
    if (!found) return;
    byId("prompt").value = found.prompt;
    byId("system").value = found.system;
    byId("prompt").focus();
  });
  document.addEventListener("keydown", (event) => {
    if (byId("compare").hidden) return;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      byId("ask").requestSubmit();
    } else if (event.key === "Escape") stop();
  });
}

function asked() {
  const [prompt, system] = [byId("prompt").value, byId("system").value];
  const messages = [{ role: "user", content: prompt }];
  if (system.trim()) messages.unshift({ role: "system", content: system });
  return { messages, max_tokens: Number(byId("limit").value) || 1, temperature: Number(byId("temperature").value) || 0 };
}

async function ask() {
  stop();
  const models = chosenModels();
  if (models.length === 0) {
    replace(byId("columns"), element("p", { class: "error" }, "Choose who answers."));
    return;
  }
  remember(byId("prompt").value, byId("system").value);
  const question = asked();
  compare.columns = models.map((model) => newColumn(model, question));
  replace(byId("columns"), compare.columns.map((column) => column.node));
  drawAgainst(models);
  announce(`Asked ${models.map(nameOf).join(", ")}.`);
  const waiting = [...compare.columns];
  const next = async () => {
    for (let column = waiting.shift(); column; column = waiting.shift()) await stream(column);
  };
  await Promise.all(Array.from({ length: AT_ONCE }, next));
}

function stop() {
  for (const column of compare.columns) {
    if (column.state === "waiting" || column.state === "busy") column.control.abort();
  }
}

function newColumn(model, question) {
  const [text, foot] = [element("div", { class: "text", dir: "auto" }), element("footer")];
  const version = element("span", { class: "mono soft" });
  const trouble = element("div");
  const head = element("header", null, element("h2", null, nameOf(model)), version);
  const node = element("article", { class: "column", "aria-label": `Answer of ${nameOf(model)}` }, head, text, trouble, foot);
  const column = { model, question, node, text, foot, version, trouble };
  return renew(column);
}

function renew(column) {
  Object.assign(column, { said: "", state: "waiting", told: nothingTold(), control: new AbortController() });
  for (const part of [column.text, column.trouble, column.foot, column.version]) part.replaceChildren();
  return column;
}

async function stream(column) {
  if (column.control.signal.aborted) return settle(column, "stopped");
  column.state = "busy";
  column.node.setAttribute("aria-busy", "true");
  drawButtons();
  try {
    await answer(column.model, column.question, column.control.signal, column.told, (piece) => {
      column.said += clean(piece);
      column.text.append(clean(piece));
    });
    settle(column, "done");
  } catch (error) {
    if (error.name === "AbortError") settle(column, "stopped");
    else settle(column, "failed", error);
  }
}

function settle(column, state, error) {
  column.state = state;
  column.node.setAttribute("aria-busy", "false");
  const { reference } = column.told;
  replace(column.version, reference && reference !== column.model ? versionIn(reference) : "");
  if (state === "failed") drawFailure(column, error);
  drawDifferences();
  drawButtons();
  const heard = { done: "has answered", stopped: "was stopped", failed: `failed: ${error?.message}` };
  announce(`${nameOf(column.model)} ${heard[state]}.`);
}

function versionIn(reference) {
  return reference.slice(reference.lastIndexOf("@") + 1);
}

function drawFailure(column, error) {
  const wait = error.retryAfter ? ` Try again in ${count(error.retryAfter, "second")}.` : "";
  const again = button("Try again", () => stream(renew(column)));
  replace(column.trouble, element("p", { class: "error" }, `${error.message}${wait}`), again);
}

function drawButtons() {
  byId("stop").disabled = !compare.columns.some((column) => column.state === "waiting" || column.state === "busy");
}

function drawAgainst(models) {
  const before = byId("against").value;
  const options = [...models.map((model) => element("option", { value: model }, nameOf(model))),
    element("option", { value: "" }, "nothing")];
  replace(byId("against"), options);
  byId("against").value = models.includes(before) ? before : models[0];
  byId("against-row").hidden = models.length < 2;
}

// Words are marked once both texts stand still.
function drawDifferences() {
  const still = (column) => column.state === "done" || column.state === "stopped";
  const reference = compare.columns.find((column) => column.model === byId("against").value);
  for (const column of compare.columns.filter(still)) {
    const known = reference && reference !== column && still(reference);
    const differs = known ? differing(reference.said, column.said) : [];
    replace(column.text, marked(column.said, differs || []));
    const notes = [...speed(column.told), column.state === "stopped" ? "stopped" : null];
    if (known) notes.push(toldOf(differs, reference, column));
    replace(column.foot, notes.filter(Boolean).map((note) => element("span", null, note)));
  }
}

function toldOf(differs, reference, column) {
  const name = nameOf(reference.model);
  if (differs === null) return "too long to compare";
  const marks = differs.filter(Boolean).length;
  const missing = wordsOf(reference.said).length - (differs.length - marks);
  if (marks === 0 && missing === 0) return `same words as ${name}`;
  return `${count(marks, "word")} not in ${name}${missing ? `, ${count(missing, "word")} left out` : ""}`;
}

function remember(prompt, system) {
  compare.prompts = compare.prompts.filter((each) => each.prompt !== prompt || each.system !== system);
  compare.prompts.unshift({ prompt, system });
  compare.prompts.length = Math.min(compare.prompts.length, 50);
  const shown = compare.prompts.map((each, index) => {
    const line = each.prompt.trim().split("\n")[0];
    return element("option", { value: index }, line.length > 60 ? `${line.slice(0, 60)}…` : line || "(empty)");
  });
  replace(byId("earlier"), element("option", { value: "" }, count(shown.length, "prompt")), shown);
  byId("earlier-label").hidden = false;
}

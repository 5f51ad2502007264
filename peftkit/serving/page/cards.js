// A card for every served adapter: what it is, what was measured, where it comes from, which names lead to it.

const served = { base: "", models: [], asked: 0 };

async function loadCards() {
  const turn = ++served.asked;
  const found = await json("/cards");
  if (turn !== served.asked) return; // asked again meanwhile: an older answer must not be drawn over a newer one
  Object.assign(served, found);
  byId("base").textContent = clean(found.base);
  drawModels(found.base, found.models.map((card) => card.model));
  const open = new Set(Array.from(byId("cards").querySelectorAll("details[open]"), (each) => each.dataset.key));
  const none = element("p", { class: "soft" }, "No adapter is served. Attach one from the registry.");
  replace(byId("cards"), found.models.length ? found.models.map(drawCard) : none);
  for (const each of byId("cards").querySelectorAll("details")) each.open = open.has(each.dataset.key);
}

function cardOf(model) {
  return Array.from(byId("cards").children).find((node) => node.dataset.model === model);
}

function drawCard(card) {
  const said = element("p", { class: "said", role: "status", tabindex: "-1" });
  return element("article", { class: "card", "data-model": card.model, "aria-label": `Adapter ${card.model}` },
    element("header", null,
      element("h2", null, card.model),
      element("span", { class: "mono soft" }, card.version),
      element("span", { class: "soft" }, `answers since ${minute(card.since)}`),
      element("span", { class: "actions" }, actionsOf(card))),
    element("p", { class: "soft" }, summaryOf(card)),
    card.trouble ? element("p", { class: "warning" }, card.trouble) : null,
    card.problems.map((problem) => element("p", { class: "warning" }, problem)),
    said,
    element("div", { class: "halves" },
      element("div", null, measuresOf(card), element("h3", null, "Aliases"), aliasesOf(card)),
      element("div", null, element("h3", null, "Made from"), madeFrom(card), lineageOf(card))),
    dataOf(card), receiptsOf(card), movesOf(card));
}

function summaryOf(card) {
  const { method, r, lora_alpha: alpha, trainable_parameters: parameters } = card.method;
  const rank = r === null ? "" : ` r=${r}${alpha === null ? "" : ` α=${alpha}`}`;
  const trained = typeof parameters === "number" ? `${parameters.toLocaleString("en")} trained parameters` : null;
  const parts = [card.recipe, method ? `${method}${rank}` : card.kind, trained, card.bytes, minute(card.created)];
  return parts.filter(Boolean).join(" · ");
}

function measuresOf(card) {
  const lines = [...card.measures, ...(card.retention ? [card.retention] : [])];
  if (lines.length === 0) return [element("h3", null, "Measured"), element("p", { class: "soft" }, "Nothing is recorded.")];
  const rows = lines.map((line) => [line.name, figure(line.before), figure(line.after), figure(line.change, verdictOf(line))]);
  return [element("h3", null, "Measured, with 95 % intervals"),
    table(`Figures of ${card.model}`, ["", "before", "after", "change"], rows)];
}

function figure(text, verdict = null) {
  return text === null ? null : element("span", null, element("span", { class: "n" }, text), " ", verdict);
}

function verdictOf(line) {
  const kinds = { better: "good", worse: "error", unclear: "soft" };
  return line.verdict && element("span", { class: kinds[line.verdict] }, line.verdict);
}

function madeFrom(card) {
  const { base, method } = card;
  return facts([
    ["task", card.task],
    ["base", base.revision ? `${base.source} @ ${base.revision}` : base.source],
    ["fingerprint", mono(base.fingerprint.slice(0, 16))],
    ["trained in", base.trained_in],
    ["licence", base.license],
    ["trains", method.target_modules.join(", ")],
    ["run", card.run ? runLink(card.run) : null],
  ]);
}

function lineageOf(card) {
  const steps = (found) => element("ul", { class: "plain" }, found.map((step) => {
    const deeper = "· ".repeat(step.depth - 1);
    const known = step.again ? "see above" : step.created ? step.score : "removed, or in another registry";
    return element("li", null, `${deeper}${step.relation} `, mono(step.reference), known ? ` ${known}` : "");
  }));
  return [
    card.ancestors.length ? [element("h3", null, "Lineage"), steps(card.ancestors)] : null,
    card.descendants.length ? [element("h3", null, "Made into"), steps(card.descendants)] : null,
  ].flat();
}

function folded(card, key, title, content) {
  return element("details", { "data-key": `${card.model} ${key}` }, element("summary", null, title), content);
}

function dataOf(card) {
  if (card.data.length === 0) return null;
  const rows = card.data.map((each) => [each.role.replace("_", " "), each.source, each.rows.toLocaleString("en"),
    each.tokens === null ? null : each.tokens.toLocaleString("en"), each.dropped || null, mono(each.sha256.slice(0, 16)), each.license]);
  const columns = ["role", "source", "rows", "tokens", "dropped", "SHA-256", "licence"];
  return folded(card, "data", `Data (${card.data.length})`, table(`Data of ${card.model}`, columns, rows));
}

function receiptsOf(card) {
  if (card.receipts.length === 0) return null;
  const each = card.receipts.map((receipt) => [element("h3", null, receipt.type), facts(receipt.facts)]);
  return folded(card, "receipts", `Receipts (${card.receipts.length})`, element("div", null, each.flat()));
}

function movesOf(card) {
  if (card.moves.length === 0) return null;
  const rows = card.moves.map((move) => [move.alias, String(move.number), minute(move.time),
    move.version ? mono(move.version) : "removed", backTo(card, move)]);
  return folded(card, "moves", `History of the aliases (${card.moves.length})`,
    table(`Moves of the aliases of ${card.name}`, ["alias", "move", "time", "version", ""], rows));
}

// Changing what is served: aliases that move and are rolled back, names that are attached, reloaded, detached.

function aliasesOf(card) {
  const lines = Object.entries(card.aliases).map(([alias, version]) => {
    const line = element("div", { class: "alias", "data-alias": alias });
    const moves = card.moves.filter((move) => move.alias === alias);
    const before = moves[1]?.version;
    const known = card.versions.find((each) => each.id === version);
    fill(line, [
      element("b", null, alias),
      mono(version),
      element("span", { class: "soft" }, [minute(known?.created ?? ""), known?.score].filter(Boolean).join(" · ")),
      element("span", { class: "actions" },
        button("Move…", () => askWhere(card, line, alias), { class: "quiet", "aria-label": `Move ${card.name}@${alias}` }),
        before ? button("Roll back…", () => confirmIn(line, `Point ${card.name}@${alias} back at ${before}?`, "Roll back",
          () => restore(card, alias, before)), { class: "quiet", "aria-label": `Roll back ${card.name}@${alias}` }) : null),
    ]);
    return line;
  });
  const another = element("div", { class: "alias" });
  fill(another, [button("New alias…", () => askWhere(card, another, null), { class: "quiet" })]);
  return [...lines, another];
}

function actionsOf(card) {
  const detach = (event) => confirmIn(event.currentTarget.closest("header"), `Stop answering to ${card.model}?`, "Detach",
    () => change(card.model, `${card.model} is detached`, adapterPath(card.model), { method: "DELETE" }));
  return [
    button("Reload", () => change(card.model, `${card.model} is what the registry says`,
      "/v1/adapters/reload", { method: "POST", body: { model: card.model } }), { class: "quiet", "aria-label": `Reload ${card.model}` }),
    button("Detach…", detach, { class: "quiet", "aria-label": `Detach ${card.model}` }),
  ];
}

function backTo(card, move) {
  if (!move.version || card.aliases[move.alias] === move.version) return null;
  const place = element("span");
  fill(place, [button("Back to this…", () => confirmIn(place, `Point ${card.name}@${move.alias} at ${move.version} again?`,
    "Roll back", () => restore(card, move.alias, move.version, move.number)), { class: "quiet" })]);
  return place;
}

function restore(card, alias, version, number) {
  const path = adapterPath(card.name, "aliases", alias, "restore");
  const body = number === undefined ? {} : { to: number };
  return change(card.model, `${card.name}@${alias} is back at ${version}`, path, { method: "POST", body });
}

// Where an alias shall point; without an alias, what the new one is called too.
function askWhere(card, line, alias) {
  const options = card.versions.filter((each) => !each.problem).map((each) => {
    const here = each.aliases.length ? ` (${each.aliases.join(", ")})` : "";
    return element("option", { value: each.id, selected: each.id === card.aliases[alias] },
      [each.id, minute(each.created), each.score].filter(Boolean).join(" · ") + here);
  });
  const which = element("select", null, options);
  const called = alias === null ? element("input", { autocomplete: "off", required: true, size: "12" }) : null;
  const fields = [called ? element("label", null, "Alias ", called) : null, element("label", null, `${alias ?? ""} points at `, which)];
  confirmIn(line, fields, "Move", () => {
    const target = alias ?? called.value.trim();
    return change(card.model, `${card.name}@${target} points at ${which.value}`,
      adapterPath(card.name, "aliases", target), { method: "PUT", body: { version: which.value } });
  });
}

// Asks in place: the question, the button that does it, and one that does not. Escape does not either.
function confirmIn(place, question, yes, act) {
  place.querySelector(".confirm")?.remove();
  const opened = document.activeElement;
  const close = () => {
    form.remove();
    opened?.focus();
  };
  const form = element("form", { class: "confirm", submit: async (event) => {
    event.preventDefault();
    for (const each of form.elements) each.disabled = true;
    await act();
    if (form.isConnected) close();
  }, keydown: (event) => {
    if (event.key !== "Escape") return;
    event.stopPropagation();
    close();
  } }, question, element("button", { class: "main" }, yes), button("Cancel", close));
  place.append(form);
  form.querySelector("input, select, button").focus();
}

// Asks the server for a change, and tells what came of it from what is served before and after.
async function change(model, done, path, options) {
  const before = new Map(served.models.map((card) => [card.model, card.version]));
  const place = () => cardOf(model)?.querySelector(".said") ?? byId("adapters-said");
  for (const each of document.querySelectorAll("#adapters .said")) each.textContent = "";
  try {
    await json(path, options);
    await loadCards();
  } catch (error) {
    say(place(), error.message, "error");
    if (byId("key").hidden) place().focus();
    return;
  }
  const moved = served.models.filter((card) => before.has(card.model) && before.get(card.model) !== card.version);
  const told = moved.map((card) => ` ${card.model} answers with ${card.version} now.`).join("");
  say(place(), `${done}.${told}`);
  place().focus();
}

function startAdapters() {
  byId("attach").addEventListener("submit", async (event) => {
    event.preventDefault();
    const name = byId("attach-name").value.trim();
    await attach(name);
    if (cardOf(name)) byId("attach-name").value = "";
  });
  byId("reload-all").addEventListener("click",
    () => change(null, "All names are what the registry says", "/v1/adapters/reload", { method: "POST" }));
}

function attach(name) {
  return change(name, `${name} is attached`, "/v1/adapters", { method: "POST", body: { model: name } });
}

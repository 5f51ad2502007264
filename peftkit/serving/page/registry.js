// Everything in the registry, filtered here, and the runs.

// Lines of a table at once; the filters find the rest.
const MOST_ROWS = 300;
const registry = { versions: [], problems: {} };

async function loadRegistry() {
  Object.assign(registry, await json("/registry"));
  const all = (read) => [...new Set(registry.versions.flatMap(read).filter(Boolean))].sort();
  options("filter-base", all((each) => each.base));
  options("filter-recipe", all((each) => each.recipe));
  options("filter-alias", all((each) => each.aliases));
  replace(byId("known"), all((each) => each.name).map((name) => element("option", { value: name })));
  drawRegistry();
}

function options(id, values) {
  const before = byId(id).value;
  replace(byId(id), element("option", { value: "" }, "any"), values.map((value) => element("option", { value }, value)));
  byId(id).value = values.includes(before) ? before : "";
}

function found() {
  const wanted = (id) => byId(`filter-${id}`).value;
  const text = wanted("text").trim().toLowerCase();
  const wide = byId("filter-all").checked || wanted("alias") !== "";
  const texts = (each) => [each.name, each.id, each.base, each.recipe, each.method, each.run, each.score, ...each.aliases];
  return registry.versions.filter((each) =>
    (wide || each.aliases.includes("latest") || each.served.length > 0 || each.problem) &&
    (!text || texts(each).some((value) => (value || "").toLowerCase().includes(text))) &&
    (!wanted("base") || each.base === wanted("base")) &&
    (!wanted("recipe") || each.recipe === wanted("recipe")) &&
    (!wanted("alias") || each.aliases.includes(wanted("alias"))) &&
    (!wanted("served") || (each.served.length > 0) === (wanted("served") === "yes")));
}

function drawRegistry() {
  const rows = found();
  const cut = rows.length > MOST_ROWS ? `, the first ${MOST_ROWS} are shown` : "";
  say(byId("registry-said"), `${count(rows.length, "version")} of ${registry.versions.length}${cut}`, "soft");
  const columns = ["adapter", "made", "base", "method", "answer NLL change", "general text change", "score", "served"];
  const lines = rows.slice(0, MOST_ROWS).map((each) => [
    element("span", null, element("b", null, each.name), " ", mono(each.id), each.aliases.map((alias) => [" ",
      element("span", { class: "tag" }, alias)])),
    each.problem ? element("span", { class: "error" }, `damaged: ${each.problem}`)
      : element("span", null, minute(each.created), each.recipe ? ` ${each.recipe}` : "", each.run ? [" ", runLink(each.run, "run")] : ""),
    each.base, each.method, each.change, each.retention, each.score,
    each.served.length ? each.served.map((model) => [element("span", { class: "n" }, model), " "]) : attachButton(each),
  ]);
  replace(byId("registry-rows"), lines.length ? table("Versions in the registry", columns, lines) : null);
}

function attachButton(each) {
  if (each.problem) return null;
  const name = each.aliases.includes("latest") ? each.name : `${each.name}@${each.id}`;
  return button("Attach", async () => {
    location.hash = "#adapters";
    await attach(name);
  }, { class: "quiet", "aria-label": `Attach ${name}` });
}

async function loadRuns() {
  const { runs } = await json("/runs");
  const kinds = { done: "good", failed: "error", died: "error", damaged: "error", interrupted: "warning" };
  const lines = runs.map((run) => [runLink(run.id), run.recipe, element("span", { class: kinds[run.state] }, run.state),
    run.started ? minute(run.started) : null, run.took, run.saved_as ? mono(run.saved_as) : null]);
  byId("runs-said").textContent = runs.length ? count(runs.length, "run") : "No run is in the folder of runs.";
  replace(byId("runs-rows"), lines.length ? table("Runs", ["run", "recipe", "state", "started", "took", "saved as"], lines) : null);
}

// A link cannot carry a key: where one is needed, the page is fetched with it and opened from memory.
function runLink(id, text = id) {
  const path = `/runs/${encodeURIComponent(id)}`;
  return element("a", { href: path, target: "_blank", rel: "noopener", click: async (event) => {
    if (!access.key) return;
    event.preventDefault();
    try {
      const html = await (await request(path)).text();
      window.open(URL.createObjectURL(new Blob([html], { type: "text/html" })), "_blank");
    } catch (error) {
      announce(error.message);
    }
  } }, text);
}

function startRegistry() {
  byId("filters").addEventListener("input", drawRegistry);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
}

// Which part of the page is shown, and the start.

const VIEWS = {
  compare: { load: loadCards, said: null },
  adapters: { load: loadCards, said: "adapters-said" },
  registry: { load: loadRegistry, said: "registry-said" },
  runs: { load: loadRuns, said: "runs-said" },
};

async function show() {
  const name = location.hash.slice(1) in VIEWS ? location.hash.slice(1) : "compare";
  for (const view of Object.keys(VIEWS)) byId(view).hidden = view !== name;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  window.scrollTo(0, 0);
  const { load, said } = VIEWS[name];
  byId("views").setAttribute("aria-busy", "true");
  try {
    if (load !== loadCards && served.base === "") await loadCards();
    await load();
  } catch (error) {
    if (said) say(byId(said), error.message, "error");
    else replace(byId("columns"), element("p", { class: "error" }, error.message));
  } finally {
    byId("views").setAttribute("aria-busy", "false");
  }
}

startKeys(show);
startCompare();
startAdapters();
startRegistry();
window.addEventListener("hashchange", show);
show();

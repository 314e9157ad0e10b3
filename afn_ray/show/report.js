"use strict";
// Draws the charts and serves the search. Text from the corpus goes into the page as text alone, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tooltip");

function showTip(handler, event, item, value) {
  if (value === null || value === undefined || value === "") {
    tip.hidden = true;
    return;
  }
  const list = document.createElement("dl");
  for (const [name, text] of Object.entries(typeof value === "object" ? value : { "": value })) {
    if (text === "" || text === "null" || text === "NaN") continue;
    list.append(element("dt", name), element("dd", text));
  }
  tip.replaceChildren(list);
  tip.hidden = false;
  const { clientWidth, clientHeight } = document.documentElement;
  const left = event.clientX + 14 + tip.offsetWidth > clientWidth ? event.clientX - 14 - tip.offsetWidth : event.clientX + 14;
  const top = event.clientY + 14 + tip.offsetHeight > clientHeight ? event.clientY - 14 - tip.offsetHeight : event.clientY + 14;
  tip.style.left = `${Math.max(0, left)}px`;
  tip.style.top = `${Math.max(0, top)}px`;
}

function element(name, text, kind) {
  const made = document.createElement(name);
  made.textContent = String(text);
  if (kind) made.className = kind;
  return made;
}

// --- vocabulary ---------------------------------------------------------------------------------

const points = data.points;

function typesAt(layer) {
  return points.text.map((text, i) => ({
    text, key: text.toLowerCase(), n: points.n[i], share: points.n_high[layer][i] / points.n[i],
    class: points.classes[points.class[i]],
  }));
}

/** HIGH share of all types of about one frequency together: four bins to each factor of ten. */
function curveOf(types) {
  const bins = new Map();
  for (const type of types) {
    const at = Math.floor(4 * Math.log10(type.n) + 1e-9);
    const bin = bins.get(at) ?? { n: 0, high: 0, log: 0 };
    bin.n += type.n;
    bin.high += type.n * type.share;
    bin.log += type.n * Math.log(type.n);
    bins.set(at, bin);
  }
  return [...bins].sort((a, b) => a[0] - b[0]).map(([, bin]) => ({ n: Math.exp(bin.log / bin.n), share: bin.high / bin.n }));
}

const MATCHES = 12;
let types = typesAt(points.layer);

function search(view) {
  const query = document.getElementById("search").value.trim().toLowerCase();
  const found = query ? types.filter((t) => t.key.includes(query)) : [];
  found.sort((a, b) => (b.key === query) - (a.key === query) || b.n - a.n);
  const noun = points.kind + (found.length === 1 ? " has" : "s have");
  document.getElementById("found").textContent = query ? `${found.length.toLocaleString("en")} ${noun} it` : "";
  const matches = document.getElementById("matches");
  matches.hidden = !found.length;
  matches.querySelector("tbody").replaceChildren(
    ...found.slice(0, MATCHES).map((t) => {
      const row = document.createElement("tr");
      const head = element("th", t.text);
      head.scope = "row";
      row.append(head, element("td", t.class), element("td", t.n.toLocaleString("en"), "figure"),
        element("td", t.share.toFixed(3), "figure"));
      return row;
    }),
  );
  return view.signal("query", query).runAsync();
}

async function drawVocabulary(view) {
  const layer = document.getElementById("layer");
  const show = () => {
    types = typesAt(layer.value);
    return view.data("types", types).data("curve", curveOf(types)).runAsync();
  };
  layer.addEventListener("change", async () => {
    await show();
    await search(view);
  });
  document.getElementById("search").addEventListener("input", () => search(view));
  await show();
  await search(view); // a page that is reloaded keeps what was typed
}

// --- all charts ---------------------------------------------------------------------------------

async function draw(place) {
  const name = place.dataset.chart;
  // `ast`: expressions are interpreted, since the page's policy forbids to compile them.
  const options = { ast: true, actions: false, defaultStyle: false, mode: "vega-lite", renderer: "svg", tooltip: showTip };
  const { view } = await vegaEmbed(place, data.charts[name], options);
  if (name === "vocabulary") await drawVocabulary(view);
  place.dataset.drawn = "";
}

for (const place of document.querySelectorAll("[data-chart]")) {
  draw(place).catch((error) => {
    place.replaceChildren(element("p", "This chart could not be drawn; the table below has its figures.", "note"));
    throw error;
  });
}
document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });

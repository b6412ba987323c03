"use strict";
(() => {
const data = JSON.parse(document.getElementById("reader-data").textContent);
if (!data) return;
const id = name => document.getElementById(name);
const [height, width] = data.grid, nCells = height * width, nSheets = data.sheets.length, nUnits = nSheets * nCells;
const LIMIT = 3;  // standard deviations at the ends of the colour scale

// ---- data: base64 -> typed arrays; a model's when it is first looked at

function unpack(text, Type) {
  const bytes = atob(text), array = new Uint8Array(bytes.length);
  for (let i = 0; i < bytes.length; i++) array[i] = bytes.charCodeAt(i);
  return new Type(array.buffer);
}
const TYPES = {units: Uint16Array, activations: Uint8Array, low: Float32Array, step: Float32Array, mean: Float32Array,
  sd: Float32Array, extremes: Uint16Array, extremes_z: Int16Array};
const opened = [];
function model(i = state.model) {
  if (!opened[i]) {
    opened[i] = {label: data.models[i].label};
    for (const key in TYPES) opened[i][key] = unpack(data.models[i][key], TYPES[key]);
  }
  return opened[i];
}
const starts = [0];  // of each text among all tokens
for (const text of data.texts) starts.push(starts[starts.length - 1] + text.words.length);
// the chosen unit: sheet * nCells + cell, of one of the models
const state = {model: 0, unit: 0, text: 0, pinned: 0, shown: 0, scale: "unit"};

// ---- colours: blue, white, orange; seen by everyone

const STOPS = data.stops;
const COLOURS = new Uint32Array(256), CSS = [];
for (let i = 0; i < 256; i++) {
  const at = i / 127.5 - 1, k = Math.max(1, STOPS.findIndex(stop => stop[0] >= at));
  const [a, b] = [STOPS[k - 1], STOPS[k]], part = (at - a[0]) / (b[0] - a[0]);
  const [red, green, blue] = [1, 2, 3].map(c => Math.round(a[c] + part * (b[c] - a[c])));
  COLOURS[i] = (255 << 24 | blue << 16 | green << 8 | red) >>> 0;
  CSS.push(`rgb(${red},${green},${blue})`);
}
const colour = (value, limit) => Math.max(0, Math.min(255, Math.round((value / limit + 1) * 127.5)));

// ---- numbers

function zOfUnit(unit, token, m = model()) {  // deviation from the unit's own mean over the sample
  const x = m.low[unit] + m.step[unit] * m.activations[token * nUnits + unit];
  return m.sd[unit] > 0 ? (x - m.mean[unit]) / m.sd[unit] : 0;
}
const values = new Float32Array(nCells);
function mapOf(m, sheet, token) {  // fills values
  const first = sheet * nCells;
  if (state.scale === "unit") {
    for (let c = 0; c < nCells; c++) values[c] = zOfUnit(first + c, token, m);
    return values;
  }
  let sum = 0, squares = 0;
  for (let c = 0; c < nCells; c++) {
    values[c] = m.low[first + c] + m.step[first + c] * m.activations[token * nUnits + first + c];
    sum += values[c];
  }
  const mean = sum / nCells;
  for (let c = 0; c < nCells; c++) squares += (values[c] - mean) ** 2;
  const sd = Math.sqrt(squares / nCells) || 1;
  for (let c = 0; c < nCells; c++) values[c] = (values[c] - mean) / sd;
  return values;
}
const neighbours = [];  // of each cell, the eight around it that are on the sheet
for (let c = 0; c < nCells; c++) {
  const row = Math.floor(c / width), column = c % width, found = [];
  for (let r = Math.max(0, row - 1); r <= Math.min(height - 1, row + 1); r++)
    for (let k = Math.max(0, column - 1); k <= Math.min(width - 1, column + 1); k++)
      if (r !== row || k !== column) found.push(r * width + k);
  neighbours.push(found);
}
function moran(map) {
  let mean = 0, above = 0, below = 0;
  for (let c = 0; c < nCells; c++) mean += map[c] / nCells;
  for (let c = 0; c < nCells; c++) {
    let around = 0;
    for (const other of neighbours[c]) around += map[other] - mean;
    above += (map[c] - mean) * around / neighbours[c].length;
    below += (map[c] - mean) ** 2;
  }
  return below > 0 ? above / below : NaN;
}
function correlations(unit) {  // with every unit of its sheet, over the tokens of all texts
  const m = model(), first = Math.floor(unit / nCells) * nCells, n = starts[starts.length - 1];
  const mean = new Float64Array(nCells), squares = new Float64Array(nCells), products = new Float64Array(nCells);
  for (let t = 0; t < n; t++) for (let c = 0; c < nCells; c++) mean[c] += m.activations[t * nUnits + first + c] / n;
  for (let t = 0; t < n; t++) {
    const own = m.activations[t * nUnits + unit] - mean[unit - first];
    for (let c = 0; c < nCells; c++) {
      const d = m.activations[t * nUnits + first + c] - mean[c];
      squares[c] += d * d;
      products[c] += own * d;
    }
  }
  return products.map((p, c) => squares[c] > 0 && squares[unit - first] > 0
    ? p / Math.sqrt(squares[c] * squares[unit - first]) : 0);
}

// ---- drawing

const signed = (value, digits) => (value < 0 ? "\u2212" : "+") + Math.abs(value).toFixed(digits);
function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}
function paint(canvas, map, limit) {
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  for (let c = 0; c < nCells; c++) pixels[c] = COLOURS[colour(map[c], limit)];
  context.putImageData(image, 0, 0);
}
function makeMap() {  // a canvas with a mark on it
  const map = element("div", undefined, "map"), canvas = element("canvas"), mark = element("div", undefined, "mark");
  [canvas.width, canvas.height] = [width, height];
  map.append(canvas, mark);
  return map;
}
function setMark(map, cell) {
  const mark = map.lastChild;
  mark.style.display = cell === null ? "none" : "block";
  if (cell === null) return;
  Object.assign(mark.style, {left: `${cell % width / width * 100}%`, top: `${Math.floor(cell / width) / height * 100}%`,
    width: `${100 / width}%`, height: `${100 / height}%`});
}
function cellAt(canvas, event) {
  const box = canvas.getBoundingClientRect();
  const column = Math.floor((event.clientX - box.left) / box.width * width);
  const row = Math.floor((event.clientY - box.top) / box.height * height);
  return Math.max(0, Math.min(height - 1, row)) * width + Math.max(0, Math.min(width - 1, column));
}
const nLayers = new Set(data.sheets.map(sheet => sheet.split(".")[1])).size, across = Math.min(12, nLayers);
const tiles = data.models.flatMap((m, i) => data.sheets.map((sheet, s) => makeTile(i, sheet, s)));
function makeTile(i, sheet, s) {
  const [, layer, branch] = sheet.match(/^layer\.(\d+)\.(\w+)$/) || [0, 0, sheet];
  const figure = element("figure"), under = element("div", undefined, "under"), map = makeMap(), canvas = map.firstChild;
  const unitAt = event => s * nCells + cellAt(canvas, event);
  under.append(element("span", `${layer} ${branch === "mlp" ? "MLP" : branch}`), element("span"));
  figure.append(under, map);
  Object.assign(canvas.dataset, {model: i, sheet: s});
  canvas.tabIndex = -1;
  canvas.setAttribute("role", "application");
  canvas.addEventListener("click", event => chooseUnit(i, unitAt(event)));
  canvas.addEventListener("mousemove", event => sayCell(i, unitAt(event)));
  canvas.addEventListener("mouseleave", () => { id("under").textContent = ""; });
  canvas.addEventListener("keydown", event => moveUnit(event));
  return {model: i, sheet: s, layer: Number(layer), branch, figure, map, canvas, value: under.lastChild};
}
data.models.forEach((m, i) => {  // side by side where there is room; layers in columns, attention above MLP
  const group = element("div", undefined, "group"), grid = element("div", undefined, "tiles");
  if (data.models.length > 1) {
    const name = element("h3", (i ? "control: " : "") + m.label);
    name.prepend(element("span", undefined, `swatch ${i ? "control" : "model"}`));
    group.append(name);
  }
  grid.style.gridTemplateColumns = `repeat(${across}, minmax(64px, 1fr))`;
  const place = tile => [Math.floor(tile.layer / across), tile.branch === "mlp" ? 1 : 0, tile.layer];
  tiles.filter(tile => tile.model === i).sort((a, b) => {
    const [p, q] = [place(a), place(b)], k = p.findIndex((v, j) => v !== q[j]);
    return k < 0 ? 0 : p[k] - q[k];
  }).forEach(tile => {
    tile.figure.style.gridColumn = tile.layer % across + 1;
    grid.append(tile.figure);
  });
  group.append(grid);
  id("sheets").append(group);
});
id("stage").classList.toggle("wide", nLayers > 6);
function moveUnit(event) {  // of the chosen unit, from key to key
  const cell = state.unit % nCells, row = Math.floor(cell / width), column = cell % width;
  const [down, right] = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key] || [0, 0];
  const page = {PageUp: -1, PageDown: 1}[event.key] || 0;
  if (!down && !right && !page) return;
  event.preventDefault();
  const r = Math.max(0, Math.min(height - 1, row + down)), c = Math.max(0, Math.min(width - 1, column + right));
  const k = (state.model * nSheets + Math.floor(state.unit / nCells) + page + tiles.length) % tiles.length;
  chooseUnit(tiles[k].model, tiles[k].sheet * nCells + r * width + c);
  tiles[k].canvas.focus();
  sayCell(state.model, state.unit);
}
function drawSheets() {
  const token = starts[state.text] + state.shown;
  for (const tile of tiles) {
    const map = mapOf(model(tile.model), tile.sheet, token), value = moran(map);
    paint(tile.canvas, map, LIMIT);
    tile.value.textContent = isNaN(value) ? "" : `I ${(Math.round(100 * value) / 100 + 0).toFixed(2).replace("-", "\u2212")}`;
    tile.canvas.setAttribute("aria-label", `${data.models[tile.model].label}, ${data.sheets[tile.sheet]}: activations of `
      + `${height} by ${width} units, Moran ${tile.value.textContent}; arrow keys choose a unit`);
  }
  const words = data.texts[state.text].words;
  id("at").textContent = `token ${state.shown + 1} of ${words.length}: \u201c${visible(words[state.shown]).trim()}\u201d`;
}
const visible = word => word === "" ? "\u00b7" : word.replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5");
let spans = [];
function drawText() {
  id("words").replaceChildren();
  spans = data.texts[state.text].words.map((word, i) => {
    const apart = word.startsWith(" ") && word.trim();  // the blank before a word is no part of its box
    const span = element("span", visible(apart ? word.slice(1) : word));
    span.dataset.token = i;
    id("words").append(apart ? " " : "", span);
    if (word.includes("\n")) id("words").append(element("br"));
    return span;
  });
  colourWords();
}
function colourWords() {  // by the chosen unit
  spans.forEach((span, i) => {
    const z = zOfUnit(state.unit, starts[state.text] + i);
    span.style.background = CSS[colour(Math.max(-LIMIT, Math.min(LIMIT, z)), 2 * LIMIT)];  // paler, so that words stay legible
  });
}
function show(token) {
  spans[state.shown]?.classList.remove("shown");
  state.shown = token;
  if (token !== state.pinned) spans[token].classList.add("shown");
  drawSheets();
  sayValue();
}
function pin(token) {
  spans[state.pinned]?.classList.remove("pinned");
  state.pinned = token;
  spans[token].classList.add("pinned");
  show(token);
}
const nameOf = unit => data.sheets[Math.floor(unit / nCells)];
const placeOf = unit => `row ${Math.floor(unit % nCells / width)}, column ${unit % nCells % width}`;
function sayCell(i, unit) {
  const z = zOfUnit(unit, starts[state.text] + state.shown, model(i));
  const whose = data.models.length > 1 ? `${data.models[i].label}, ` : "";
  id("under").textContent = `${whose}${nameOf(unit)}, ${placeOf(unit)}, unit ${model(i).units[unit]}: ${signed(z, 2)} sd`;
}
function sayValue() {
  if (!id("value")) return;
  const z = zOfUnit(state.unit, starts[state.text] + state.shown);
  id("value").textContent = `${signed(z, 2)} sd at \u201c${visible(data.texts[state.text].words[state.shown]).trim()}\u201d`;
}

// ---- the panel of a unit

const nKept = unit => model().extremes.length / nUnits;
function topWord(unit) {
  return visible(data.sample.words[model().extremes[unit * nKept()]]).trim();
}
function context(place) {  // words before, the word, words after, of the same text
  const ends = data.sample.ends, k = ends.findIndex(end => end > place), words = data.sample.words;
  const first = Math.max(k ? ends[k - 1] : 0, place - 7), last = Math.min(ends[k], place + 6);
  return [words.slice(first, place), [words[place]], words.slice(place + 1, last)].map(w => w.length ? visible(w.join("")) : "");
}
function listOf(unit, which, className) {
  const list = element("ol", undefined, `top ${className}`);
  for (const j of which) {
    const item = element("li"), text = element("span"), [before, word, after] = context(model().extremes[unit * nKept() + j]);
    item.append(element("span", signed(model().extremes_z[unit * nKept() + j] / 100, 1)), text);
    text.append(before, element("mark", word), after);
    list.append(item);
  }
  return list;
}
function drawPanel() {
  const panel = id("panel"), unit = state.unit;
  for (const tile of tiles) {
    const here = tile.model === state.model && tile.sheet === Math.floor(unit / nCells);
    setMark(tile.map, here ? unit % nCells : null);
    tile.canvas.tabIndex = here ? 0 : -1;
  }
  const r = correlations(unit), first = unit - unit % nCells, n = starts[starts.length - 1];
  const map = makeMap(), around = element("div"), half = nKept() / 2;
  paint(map.firstChild, r, 1);
  setMark(map, unit % nCells);
  map.firstChild.id = "correlations";
  map.firstChild.setAttribute("role", "img");
  map.firstChild.setAttribute("aria-label", `Correlation of unit ${model().units[unit]} with every unit of ${nameOf(unit)}`);
  map.firstChild.addEventListener("click", event => chooseUnit(state.model, first + cellAt(event.target, event)));
  around.id = "around";
  const row = Math.floor(unit % nCells / width), column = unit % nCells % width;
  for (let i = row - 1; i <= row + 1; i++) for (let j = column - 1; j <= column + 1; j++) {
    if (i < 0 || j < 0 || i >= height || j >= width) { around.append(element("div", undefined, "edge")); continue; }
    const cell = i * width + j, own = cell === unit % nCells, button = element("button");
    button.type = "button";
    button.append(element("b", own ? "this unit" : `r ${signed(r[cell], 2)}`), element("i", topWord(first + cell)));
    button.style.background = own ? "#fff" : CSS[colour(r[cell], 2)];
    button.title = `unit ${model().units[first + cell]}, ${placeOf(first + cell)}`;
    if (!own) button.addEventListener("click", () => chooseUnit(state.model, first + cell));
    around.append(button);
  }
  const value = element("div");
  value.id = "value";
  const title = element("div", undefined, "wide"), left = element("div"), right = element("div");
  title.append(element("h3", `${nameOf(unit)}, unit ${model().units[unit]}`),
    element("div", `${placeOf(unit)}; ${model().label}`, "soft"), value);
  left.append(element("h4", "Correlation with its sheet"), map,
    element("div", `Pearson r over the ${n} tokens of the texts here, blue \u22121 to orange +1; click for another unit.`, "soft"),
    element("h4", "Neighbours: r, and their top token"), around);
  right.append(element("h4", "Highest at"), listOf(unit, [...Array(half).keys()], "high"),
    element("h4", "Lowest at"), listOf(unit, [...Array(half).keys()].map(k => 2 * half - 1 - k), "low"),
    element("div", `In ${data.sample.what}; numbers are standard deviations of the unit from its mean there.`, "soft"));
  panel.replaceChildren(title, left, right);
  sayValue();
}
function chooseUnit(i, unit) {
  [state.model, state.unit] = [i, unit];
  drawPanel();
  colourWords();
}

// ---- controls

function press(group, chosen) {
  for (const button of group.querySelectorAll("button")) button.setAttribute("aria-pressed", String(button === chosen));
}
data.texts.forEach((text, i) => {
  const begin = text.words.slice(0, 9).join("").replace(/\s+/g, " ").trim();
  const option = element("option", `${text.name}: ${begin} \u2026`);
  option.value = i;
  id("text").append(option);
});
id("text").addEventListener("change", event => {
  state.text = Number(event.target.value);
  state.pinned = state.shown = 0;
  drawText();
  pin(0);
});
id("scales").addEventListener("click", event => {
  if (!event.target.dataset.scale) return;
  state.scale = event.target.dataset.scale;
  press(id("scales"), event.target);
  nameColours();
  show(state.shown);
});
function nameColours() {
  id("unit-of-colour").textContent = state.scale === "unit"
    ? `Standard deviations of each unit from its own mean, over ${data.sample.what}.`
    : "Standard deviations from the mean of the sheet's units at this token.";
}
const tokenOf = event => event.target.dataset.token === undefined ? null : Number(event.target.dataset.token);
id("words").addEventListener("mouseover", event => { if (tokenOf(event) !== null) show(tokenOf(event)); });
id("words").addEventListener("mouseleave", () => show(state.pinned));
id("words").addEventListener("click", event => { if (tokenOf(event) !== null) pin(tokenOf(event)); });
id("words").addEventListener("keydown", event => {
  const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
  if (!step) return;
  event.preventDefault();
  pin(Math.max(0, Math.min(spans.length - 1, state.pinned + step)));
  spans[state.pinned].scrollIntoView({block: "nearest"});
});
const bar = document.querySelector(".bar canvas").getContext("2d"), strip = bar.createImageData(256, 1);
new Uint32Array(strip.data.buffer).set(COLOURS);
bar.putImageData(strip, 0, 0);
id("reader-caption").textContent = "Activations of all units at the chosen token, each sheet a map of "
  + `${height}\u00d7${width} units at their places on the grid; labels are layer and branch; I is Moran\u2019s I of the `
  + "map as it is shown. Each text is read from its start. Colours end at \u00b13 standard deviations.";
id("interactive").hidden = false;
nameColours();
{ // to begin with, a token inside the first text and the unit that is highest there
  const token = Math.min(8, data.texts[0].words.length - 1);
  for (let u = 1; u < nUnits; u++) if (zOfUnit(u, token) > zOfUnit(state.unit, token)) state.unit = u;
  drawText();
  pin(token);
  drawPanel();
}
})();

// What is folded is open in print; figures keep their numbers.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")].filter(part => part.querySelector("img, table, pre"));
  folded.forEach(part => { part.open = true; });
});
addEventListener("afterprint", () => folded.forEach(part => { part.open = false; }));

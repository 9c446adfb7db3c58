// The page: a picture goes to the service once for its boxes, once more for how they were found.
// Whatever the service says is shown as text, never as HTML.

const STEP = 700; // milliseconds of one layer when playing
const LARGEST = 2048; // pixels of the long side that the page keeps; boxes follow the picture's own size
const TRIES = 5; // when the service is busy
const SAME = 0.03; // of the picture: so far may two boxes lie apart that are one, computed in two number formats
const EXACT = 0.02; // so far may two scores lie apart that are one
const ROUGH = 0.08; // and so far where one of them was computed with eight bits of mantissa
const INK = "#19d3f3"; // of the one box that is looked into: seldom among a picture's colours
const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], Enter: [0, 0] };
const KINDS = ["#2ca02c", "#d62728", "#4a90d9"]; // small, large and wide, large and tall boxes

const at = (id) => document.getElementById(id);
const canvas = at("picture");
const unit = (value) => Math.min(Math.max(value, 0), 1);
const say = (text) => (at("status").textContent = text); // of the picture
const tell = (text) => (at("says").textContent = text); // of what is drawn on it
const make = (tag, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children); // strings become text
  return node;
};

// What is known of the picture on the page; a new picture replaces all of it.
let now = null;
let categories = [];
let apart = EXACT; // of scores
let known = null; // what the service says of its model, once asked for
let usual = null; // boxes of every query over other pictures, once asked for
let timer = 0;

// ---- asking the service ----

const wait = (seconds) => new Promise((resolve) => setTimeout(resolve, seconds * 1000));

// Return the answer's JSON; a busy service is asked again, any other refusal is an Error with the service's words.
async function ask(path, options = {}, tries = TRIES) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The service did not answer: it may have stopped, or the picture is larger than it takes.");
  }
  if (answer.status === 503 && tries > 1) {
    const said = at("status").textContent;
    if (options.signal) say("The service is busy; trying again …");
    await wait(Number(answer.headers.get("Retry-After")) || 1);
    options.signal?.throwIfAborted();
    if (options.signal) say(said);
    return ask(path, options, tries - 1);
  }
  const said = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(said.error || `The service answered ${answer.status}.`);
  return said;
}

// Ask about a picture; the request ends when another picture takes its place.
const askOf = ({ file, type, stop }, path) =>
  ask(path, { method: "POST", body: file, headers: { "Content-Type": type }, signal: stop.signal });

// Show what went wrong, unless it belongs to a picture that is no longer on the page.
function complain(error, picture = now) {
  if (error.name === "AbortError" || picture !== now) return;
  at("error").textContent = error.message;
  at("error").hidden = false;
}

// ---- a picture arrives ----

async function take(file, name) {
  pause(); // what plays is of the last picture
  now?.stop.abort();
  const type = file.type.startsWith("image/") ? file.type : "application/octet-stream";
  const picture = { file, name, type, stop: new AbortController() };
  now = picture;
  at("error").hidden = true;
  at("work").hidden = true;
  try {
    if (!categories.length) say("The model is being loaded …");
    await theModel();
    if (picture !== now) return;
    say(`Looking at ${name} …`);
    const pixels = decoded(file).catch(() => null); // the service's reason is the better one, if it has one too
    const found = await askOf(picture, "predict?threshold=0");
    picture.pixels = await pixels;
    if (!picture.pixels) throw new Error("The detector can read this picture, but this browser cannot show it.");
    if (picture !== now) return;
    Object.assign(picture, found, { size: found.image });
  } catch (error) {
    if (picture === now) say("No picture.");
    return complain(error, picture);
  }
  at("work").hidden = false;
  at("view-boxes").checked = true;
  show();
}

// Return the pixels upright, as the service sees them, and no more of them than the page can use.
async function decoded(file) {
  const whole = await createImageBitmap(file, { imageOrientation: "from-image" });
  const scale = LARGEST / Math.max(whole.width, whole.height);
  if (scale >= 1) return whole;
  const [resizeWidth, resizeHeight] = [whole.width, whole.height].map((side) => Math.max(Math.round(side * scale), 1));
  return createImageBitmap(whole, { resizeWidth, resizeHeight, resizeQuality: "medium" });
}

// Show the sample pictures; a service that has just started may still be gathering them.
async function listSamples(tries = TRIES) {
  const samples = await ask("samples");
  if (!samples.length && tries > 1) return wait(2).then(() => listSamples(tries - 1));
  for (const { name, url } of samples) {
    const image = make("img", { src: url.replace(/^\//, ""), alt: `Sample ${name}` });
    const button = make("button", { type: "button" }, image);
    button.addEventListener("click", () => fetch(image.src).then((answer) => answer.blob()).then(
      (file) => take(file, name), () => complain(new Error("The service did not hand out its sample.")),
    ));
    at("samples").append(make("li", {}, button));
  }
}

// Ask for the model until it is loaded, once for all who wait for it.
const theModel = () =>
  (known ??= tellModel().catch((error) => {
    known = null; // so that the next picture asks again
    throw error;
  }));

async function tellModel() {
  const late = setTimeout(() => (at("model").textContent = "The model is being loaded …"), 1000);
  const model = await ask("model", {}, Infinity).finally(() => clearTimeout(late));
  categories = model.categories;
  apart = model.precision === "bf16" ? ROUGH : EXACT;
  at("threshold").value = model.threshold;
  const names = categories.slice(0, 4).map((each) => each.name);
  const rest = categories.length > names.length ? ` and ${categories.length - names.length} more` : "";
  const precision = typeof model.AP === "number" ? `, AP ${model.AP.toFixed(3)}` : "";
  at("model").textContent = `${model.name}: ${model.recipe}${precision}; finds ${names.join(", ")}${rest}`;
}

// ---- what is shown ----

const view = () => document.querySelector("input[name=view]:checked").value;
const threshold = () => Number(at("threshold").value);
const visible = () => now.detections.filter((each) => each.score >= threshold());

// Bring the whole page in line with what is known.
function show() {
  for (const part of document.querySelectorAll("[data-view]")) part.hidden = part.dataset.view !== view();
  at("how").hidden = true; // until there is something to tell
  at("error").hidden = true; // until it happens again
  pause();
  tell("");
  listFound();
  const asking = view() === "encoder";
  const label = asking ? "The picture. Arrow keys move the point that is asked." : "The picture with its boxes";
  canvas.tabIndex = asking ? 0 : -1;
  canvas.setAttribute("role", asking ? "application" : "img");
  canvas.setAttribute("aria-label", label);
  draw();
  if (view() === "layers") showLayers();
  if (asking) showEncoder();
}

function listFound() {
  const least = threshold();
  const shown = visible();
  at("threshold-said").textContent = least.toFixed(2);
  const count = shown.length === 1 ? "1 object" : `${shown.length || "No"} objects`;
  const hint = shown.length ? "" : " A lower least score shows more.";
  say(`${count} in ${now.name} with a score of ${least.toFixed(2)} or more, in ${now.seconds.toFixed(2)} s.${hint}`);
  at("found-title").textContent = shown.length ? `Found: ${shown.length}` : "Found";
  at("found").replaceChildren(...shown.map(entry));
}

function entry(detection) {
  const swatch = make("span", { className: "swatch" });
  swatch.style.background = colour(detection.category_id);
  const score = make("span", { className: "number" }, detection.score.toFixed(2));
  const button = make("button", { type: "button" }, swatch, detection.name, score);
  button.setAttribute("aria-pressed", detection === now.chosen);
  button.addEventListener("click", () => choose(detection));
  return make("li", {}, button);
}

// The colours of drawn pictures: a golden angle apart, in the order of the model's categories.
function colour(category) {
  const place = categories.findIndex((each) => each.id === category);
  return `hsl(${((Math.max(place, 0) * 0.381966) % 1) * 360} 100% 62.5%)`;
}

// ---- how a box was found ----

function choose(detection) {
  now.chosen = detection;
  now.query = null; // until its own is known
  at("view-layers").checked = true;
  show();
  at("found").children[visible().indexOf(detection)]?.firstChild.focus({ preventScroll: true });
  at("frame").scrollIntoView({ block: "nearest" });
}

// Tell how the chosen box was found; the service is asked when somebody first wants to know.
async function showLayers() {
  const picture = now;
  const chosen = (picture.chosen ??= visible()[0] || picture.detections[0]);
  if (!chosen) return tell("Nothing was found in this picture.");
  if (!picture.looked) tell("Looking inside …");
  try {
    picture.look ??= askOf(picture, "look");
    picture.looked = await picture.look;
    if (picture === now && chosen === now.chosen && view() === "layers") tellQuery(queryOf(picture.looked, chosen));
  } catch (error) {
    picture.look = null; // so that a later click asks again
    if (picture === now) tell("");
    complain(error, picture);
  }
}

// Return the query that said a detection, or null: its box and its score of that class are the same, or nearest.
function queryOf(look, { box_xyxy, category_id, score }) {
  const side = Math.max(look.image.width, look.image.height);
  const aside = ({ boxes_xyxy }) =>
    Math.max(...boxes_xyxy.at(-1).map((value, i) => Math.abs(value - box_xyxy[i]))) / side;
  const above = ({ scores_by_category }) => Math.abs(scores_by_category[category_id] - score);
  const gap = (query) => aside(query) / SAME + above(query) / apart;
  const same = look.queries.filter((query) => aside(query) < SAME && above(query) < apart);
  return same.reduce((one, other) => (one && gap(one) <= gap(other) ? one : other), null);
}

function tellQuery(query) {
  const look = now.looked;
  now.query = query;
  at("how").hidden = !query;
  if (!query) return tell(`Its query is not among the ${look.queries.length} best, which are all that is looked into.`);
  const origin = look.ranked
    ? `the token of rank ${query.query + 1} among those that the encoder finds most like an object`
    : "learned once for all pictures";
  const said = `${query.name}, ${query.score.toFixed(2)}`;
  at("query").textContent = `Query ${query.query} of ${look.num_queries} made this box: ${origin}. It says ${said}.`;
  at("row").max = look.rows.length - 1;
  const heads = query.attention[0].map((_, i) => new Option(`head ${i + 1}`, i));
  const wanted = at("head").value || "mean";
  at("head").replaceChildren(new Option("all heads", "mean"), ...heads, new Option("no head", "none"));
  at("head").value = wanted;
  at("scores").replaceChildren(...look.rows.map((name, row) => scoreRow(name, query.scores[row])));
  goTo(Math.min(now.row ?? Infinity, look.rows.length - 1));
  at("rank").hidden = !look.ranked;
  at("usual").hidden = true;
  if (!at("samples").children.length) return; // no pictures that a usual place could be of
  usual ??= ask("usual").catch(() => null);
  usual.then((places) => query === now.query && places?.[query.query] && drawPlaces(places[query.query]));
}

function scoreRow(name, score) {
  const bar = make("div", { className: "bar" });
  bar.style.width = `${100 * (score ?? 0)}%`;
  const number = make("td", {}, score === null ? "–" : score.toFixed(2));
  return make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, bar), number);
}

// Return which decoder layer a row belongs to; less than 0 is what the query starts from.
const layerOf = (row) => row - (now.looked.rows.length - now.query.attention.length);

// Show what one layer said, and where it looked to say so.
function goTo(row) {
  now.row = row;
  const { rows } = now.looked;
  at("row").value = row;
  at("row-said").textContent = rows[row];
  at("row").setAttribute("aria-valuetext", rows[row]);
  for (const [i, each] of [...at("scores").children].entries()) each.classList.toggle("current", i === row);
  const layer = layerOf(row);
  if (layer < 0) tell("Where the query starts: it has not looked yet.");
  else tellMap(lookedAt(layer), "Where this layer looked");
  draw();
}

function pause() {
  clearInterval(timer);
  timer = 0;
  at("play").textContent = "Play";
}

function play() {
  if (timer) return pause();
  if (!now.query) return;
  at("play").textContent = "Stop";
  goTo(0);
  timer = setInterval(() => {
    goTo(now.row + 1);
    if (now.row === now.looked.rows.length - 1) pause();
  }, STEP);
}

// ---- attention ----

// Return a map as numbers, its largest weight, and its grid: of one head, or the mean of all.
function asMap(heads, grid) {
  const weights = new Float32Array(grid.width * grid.height);
  for (const { cells, largest } of heads) {
    const bytes = atob(cells);
    for (let i = 0; i < weights.length; i++) weights[i] += (bytes.charCodeAt(i) * largest) / 255 / heads.length;
  }
  return { weights, grid, largest: weights.reduce((one, other) => Math.max(one, other), 0) };
}

function lookedAt(layer) {
  const head = at("head").value;
  if (layer < 0 || head === "none") return null;
  const heads = now.query.attention[layer];
  return asMap(head === "mean" ? heads : [heads[Number(head)]], now.looked.grid);
}

function tellMap(map, words) {
  tell(map ? `${words}; its brightest cell has ${(100 * map.largest).toFixed(1)} % of the attention.` : "");
}

// Darken the picture and lay a map over it, if there is one.
function drawMap(pen, map, width, height) {
  pen.fillStyle = "rgb(0 0 0 / 55%)";
  pen.fillRect(0, 0, width, height);
  if (!map) return;
  const { weights, grid, largest } = map;
  const small = new OffscreenCanvas(grid.width, grid.height);
  const image = new ImageData(grid.width, grid.height);
  weights.forEach((weight, i) => {
    const part = largest > 0 ? weight / largest : 0;
    // from clear over red and orange to pale yellow
    image.data.set([255, 60 + 180 * part, 30 + 130 * part * part, 235 * Math.sqrt(part) * unit(part * 4)], 4 * i);
  });
  small.getContext("2d").putImageData(image, 0, 0);
  pen.imageSmoothingEnabled = false; // a cell is what the model knows, no finer
  pen.drawImage(small, 0, 0, width, height);
}

// ---- ask the encoder ----

function showEncoder() {
  at("which-layer").hidden = !now.map; // how many there are is said with the first answer
  if (now.map) tellMap(encoderMap(), "What the encoder relates this point to, by all heads");
  else tell("Click a point of the picture, or go there by the arrow keys, to see what it is related to.");
}

async function askPoint(x, y, delay = 0) {
  const picture = now;
  const point = [unit(x), unit(y)];
  picture.point = point;
  draw();
  await wait(delay);
  if (picture !== now || picture.point !== point) return; // the point has moved on
  tell("Asking …");
  try {
    const said = await askOf(picture, `look/point?x=${point[0].toFixed(4)}&y=${point[1].toFixed(4)}`);
    if (picture !== now || picture.point !== point) return;
    picture.map = said;
    const layer = at("encoder-layer").value || said.layers.length - 1;
    at("encoder-layer").replaceChildren(...said.layers.map((_, i) => new Option(String(i + 1), i)));
    at("encoder-layer").value = layer;
    if (view() === "encoder") show();
  } catch (error) {
    if (picture === now) tell("");
    complain(error, picture);
  }
}

const encoderMap = () => asMap([now.map.layers[Number(at("encoder-layer").value)]], now.map.grid);

// ---- drawing ----

// Make a canvas sharp on this screen, and return its pen, which measures in CSS pixels.
function penOf(where, width, height) {
  const density = window.devicePixelRatio || 1;
  where.width = Math.round(width * density);
  where.height = Math.round(height * density);
  where.style.width = `${width}px`;
  where.style.height = `${height}px`;
  const pen = where.getContext("2d");
  pen.scale(density, density);
  return pen;
}

function draw() {
  if (!now?.pixels || at("work").hidden) return;
  const aspect = now.size.width / now.size.height;
  const width = Math.floor(Math.min(at("frame").clientWidth, Math.max(window.innerHeight * 0.7, 240) * aspect));
  const height = Math.max(Math.round(width / aspect), 1);
  const pen = penOf(canvas, width, height);
  const scale = width / now.size.width;
  pen.fillStyle = "white"; // what the model sees behind transparent pixels
  pen.fillRect(0, 0, width, height);
  pen.drawImage(now.pixels, 0, 0, width, height);
  if (view() === "layers" && now.looked && now.query) drawLayer(pen, scale, width, height);
  else if (view() === "encoder") drawPoint(pen, width, height);
  else for (const each of visible().reverse()) {
    outline(pen, each.box_xyxy, scale, width, colour(each.category_id), `${each.name} ${each.score.toFixed(2)}`);
  }
}

// The way of the box: dotted where it started, faint where it was, bold where it is after this layer.
function drawLayer(pen, scale, width, height) {
  const { query, row, looked: look } = now;
  drawMap(pen, lookedAt(layerOf(row)), width, height);
  for (let i = 0; i < row; i++) {
    pen.globalAlpha = 0.35 + (0.4 * i) / look.rows.length;
    pen.setLineDash(i ? [] : [3, 4]);
    outline(pen, query.boxes_xyxy[i], scale, width, "white", "", 1);
  }
  pen.globalAlpha = 1;
  pen.setLineDash([]);
  const caption = `${query.name} ${query.scores[row]?.toFixed(2) ?? ""}`;
  outline(pen, query.boxes_xyxy[row], scale, width, INK, caption, 3);
}

function drawPoint(pen, width, height) {
  drawMap(pen, now.map && encoderMap(), width, height);
  if (!now.point) return;
  const [x, y] = [now.point[0] * width, now.point[1] * height];
  for (const [ink, line] of [["black", 5], ["white", 2]]) {
    pen.strokeStyle = ink;
    pen.lineWidth = line;
    pen.beginPath();
    pen.arc(x, y, 7, 0, 2 * Math.PI);
    pen.stroke();
  }
}

function outline(pen, [x0, y0, x1, y1], scale, room, ink, caption, line = 2) {
  pen.strokeStyle = ink;
  pen.lineWidth = line;
  pen.strokeRect(x0 * scale, y0 * scale, (x1 - x0) * scale, (y1 - y0) * scale);
  if (!caption) return;
  const [size, high] = room < 500 ? [11, 15] : [13, 18];
  pen.font = `600 ${size}px system-ui, sans-serif`;
  const text = caption.length > 40 ? `${caption.slice(0, 30)}…${caption.slice(-5)}` : caption;
  const wide = pen.measureText(text).width + 8;
  const x = Math.max(Math.min(x0 * scale - line / 2, room - wide), 0);
  const y = Math.max(y0 * scale - (y0 * scale >= high ? high : 0), 0);
  pen.fillStyle = ink;
  pen.fillRect(x, y, wide, high);
  pen.fillStyle = "black";
  pen.fillText(text, x + 4, y + size);
}

// The middles of a query's boxes in other pictures, as the paper's figure 7 draws them.
function drawPlaces(boxes) {
  const side = 160;
  const pen = penOf(at("places"), side, side);
  const areas = boxes.map(([, , w, h]) => w * h).sort((one, other) => one - other);
  const median = areas[Math.floor(areas.length / 2)];
  for (const [x, y, w, h] of boxes) {
    pen.fillStyle = KINDS[w * h < median ? 0 : w >= h ? 1 : 2];
    pen.beginPath();
    pen.arc(x * side, y * side, 3, 0, 2 * Math.PI);
    pen.fill();
  }
  at("seen").textContent = boxes.length;
  at("usual").hidden = false;
}

// ---- hands on the page ----

const area = ([x0, y0, x1, y1]) => (x1 - x0) * (y1 - y0);

function clicked(event) {
  const [x, y] = [event.offsetX / canvas.clientWidth, event.offsetY / canvas.clientHeight];
  if (view() === "encoder") return askPoint(x, y);
  const [px, py] = [x * now.size.width, y * now.size.height];
  const holds = ({ box_xyxy: [x0, y0, x1, y1] }) => px >= x0 && px <= x1 && py >= y0 && py <= y1;
  const [smallest] = visible().filter(holds).sort((one, other) => area(one.box_xyxy) - area(other.box_xyxy));
  if (smallest) choose(smallest);
}

function pressed(event) {
  const move = MOVES[event.key];
  if (!move || view() !== "encoder") return;
  event.preventDefault();
  const { width, height } = now.map?.grid || { width: 16, height: 16 };
  const [x, y] = now.point || [0.5, 0.5];
  askPoint(x + move[0] / width, y + move[1] / height, event.key === "Enter" ? 0 : 0.2);
}

function arrives(files) {
  if (files?.length) take(files[0], files[0].name || "pasted picture");
}

const on = (where, what, act) => where.addEventListener(what, act);
const dropping = (is) => document.body.classList.toggle("dropping", is);

on(at("file"), "change", (event) => {
  arrives(event.target.files);
  event.target.value = ""; // so that the same file can be chosen again
});
on(document, "paste", (event) => arrives(event.clipboardData?.files));
on(document, "dragleave", () => dropping(false));
on(document, "dragover", (event) => {
  event.preventDefault();
  dropping(true);
});
on(document, "drop", (event) => {
  event.preventDefault();
  dropping(false);
  arrives(event.dataTransfer?.files);
});
for (const radio of document.querySelectorAll("input[name=view]")) on(radio, "change", show);
on(at("threshold"), "input", show);
on(at("encoder-layer"), "change", show);
on(at("head"), "change", () => now.query && goTo(now.row));
on(at("row"), "input", (event) => {
  pause();
  if (now.query) goTo(Number(event.target.value));
});
on(at("play"), "click", play);
on(canvas, "click", clicked);
on(canvas, "keydown", pressed);
on(window, "resize", draw);
theModel().catch(complain);
listSamples().catch(complain);

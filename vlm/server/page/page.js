// The search page: its state is the address, every change of the address is a search. No build, no other host.

const API = "/api/v1";
const PAGE_SIZE = 40;
const FOLD_COSINE = 0.95;
const MOST_VALUES = 12;
const MOST_WORDS = 32;
const ANSWER_SECONDS = 120;
const byId = (id) => document.getElementById(id);

// --- requests ---------------------------------------------------------------------------------------------------------

const token = { value: sessionStorage.getItem("token") ?? "" };

async function call(path, body, signal) {
  const headers = {};
  const sent = token.value;
  if (sent) headers.Authorization = `Bearer ${sent}`;
  if (body) headers["Content-Type"] = "application/json";
  // a browser waits for ever where a connection was lost without a word, and what waits is not asked again
  const late = AbortSignal.timeout(1000 * ANSWER_SECONDS);
  const signals = signal ? AbortSignal.any([signal, late]) : late;
  const options = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal: signals };
  const response = await fetch(path, options).catch(throwReadable);
  if (response.status === 401) {
    // another request may have got a new token meanwhile
    if (sent === token.value) await askForToken(sent);
    return call(path, body, signal);
  }
  if (!response.ok) {
    const problem = await response.json().catch(() => ({ error: `The server answered ${response.status}.` }));
    throw new Error(problem.error);
  }
  return response;
}

const callJson = async (path, body, signal) => (await call(path, body, signal)).json().catch(throwReadable);

function throwReadable(error) {
  if (error.name === "TimeoutError") throw new Error(`The server has not answered for ${ANSWER_SECONDS} seconds.`);
  if (error instanceof TypeError) throw new Error("The server cannot be reached.");
  throw error;
}

function askForToken(refused) {
  const dialog = byId("token-dialog");
  if (!dialog.open) {
    byId("token-refused").hidden = !refused;
    dialog.returnValue = "";
    dialog.showModal();
  }
  return new Promise((resolve, reject) => {
    dialog.addEventListener("close", () => {
      if (!dialog.returnValue) {
        reject(new Error("This server asks for a token."));
        return;
      }
      token.value = byId("token").value.trim();
      sessionStorage.setItem("token", token.value);
      resolve();
    }, { once: true });
  });
}

const indexPath = (verb) => `${API}/indexes/${encodeURIComponent(state.index)}/${verb}`;
const imagePath = (verb, uid) => `${indexPath(verb)}?uid=${encodeURIComponent(uid)}`;

// an <img> cannot carry a token, so with one the bytes are fetched
async function showImage(img, path) {
  if (!token.value) {
    img.src = path;
    return;
  }
  try {
    const blob = await (await call(path)).blob();
    img.src = URL.createObjectURL(blob);
    img.addEventListener("load", () => URL.revokeObjectURL(img.src), { once: true });
  } catch {
    img.dispatchEvent(new Event("error"));
  }
}

// --- state ------------------------------------------------------------------------------------------------------------

// terms: {kind: "text" | "item" | "image", value, sign: 1 | -1, image?: data URL}; images are not part of the address
const state = { index: "", view: "search", terms: [], values: {}, ranges: {}, words: "", fold: false, relevant: false, least: "", sort: "" };
let fields = [];
let hits = [];
let next = "";
let running = null;
const selected = new Map();
const VIEWS = ["search", "map", "classify"];
let indexes = [];
let map = null;

function readAddress() {
  const address = new URLSearchParams(location.search);
  const images = state.terms.filter((term) => term.kind === "image");
  state.index = address.get("index") || indexes[0].name;
  state.view = VIEWS.includes(address.get("view")) ? address.get("view") : "search";
  state.terms = [];
  for (const [name, value] of address) {
    const sign = name.startsWith("-") ? -1 : 1;
    const kind = { q: "text", like: "item" }[name.replace("-", "")];
    if (kind && value) state.terms.push({ kind, value, sign });
  }
  state.terms.push(...images);
  state.words = address.get("words") ?? "";
  state.fold = address.has("fold");
  state.relevant = address.has("relevant");
  state.least = address.get("least") ?? "";
  state.sort = address.get("sort") ?? "";
  state.values = {};
  state.ranges = {};
  for (const [name, value] of address) {
    if (name.startsWith("in.")) (state.values[name.slice(3)] ??= []).push(readValue(value));
    if (name.startsWith("range.")) state.ranges[name.slice(6)] = value.split("~");
  }
}

// written by hand it may be bare text
function readValue(value) {
  try {
    return JSON.parse(value);
  } catch {
    return value;
  }
}

function writeAddress() {
  const address = new URLSearchParams();
  if (byId("index").options.length > 1) address.set("index", state.index);
  if (state.view !== "search") address.set("view", state.view);
  for (const term of state.terms) {
    if (term.kind === "image") continue;
    address.append((term.sign < 0 ? "-" : "") + (term.kind === "text" ? "q" : "like"), term.value);
  }
  for (const name of ["words", "least", "sort"]) if (state[name]) address.set(name, state[name]);
  for (const name of ["fold", "relevant"]) if (state[name]) address.set(name, "");
  for (const [name, values] of Object.entries(state.values))
    for (const value of values) address.append(`in.${name}`, JSON.stringify(value));
  for (const [name, ends] of Object.entries(state.ranges)) if (ends.some(Boolean)) address.set(`range.${name}`, ends.join("~"));
  history.pushState(null, "", address.size ? `?${address}` : location.pathname);
}

function changed() {
  writeAddress();
  showControls();
  search();
}

// --- the query --------------------------------------------------------------------------------------------------------

const literal = (value) => (typeof value === "number" ? String(value) : `'${String(value).replaceAll("'", "''")}'`);
const quoted = (name) => `"${name.replaceAll('"', '""')}"`;

function filterText() {
  const conditions = [];
  for (const [name, values] of Object.entries(state.values))
    if (values.length) conditions.push(`${quoted(name)} in (${values.map(literal).join(", ")})`);
  for (const [name, [low, high]] of Object.entries(state.ranges)) {
    if (low) conditions.push(`${quoted(name)} >= ${Number(low)}`);
    if (high) conditions.push(`${quoted(name)} <= ${Number(high)}`);
  }
  return conditions.join(" and ");
}

// weights follow the order texts, images, items, minus; only an item or image that is subtracted needs them
function requestOf(after) {
  const take = (kind, sign) => state.terms.filter((term) => term.kind === kind && (!sign || term.sign === sign));
  const texts = take("text", 1), images = take("image"), items = take("item"), minus = take("text", -1);
  const request = {
    texts: texts.map((term) => term.value),
    images: images.map((term) => term.image),
    items: items.map((term) => term.value),
    minus: minus.map((term) => term.value),
    top: PAGE_SIZE,
    where: filterText(),
    words: state.words,
    after,
  };
  const positioned = [...texts, ...images, ...items];
  if (positioned.some((term) => term.sign < 0)) request.weights = [...positioned.map((term) => term.sign), ...minus.map(() => 1)];
  if (state.fold) request.duplicates = FOLD_COSINE;
  if (state.relevant) request.relevant = true;
  if (state.least !== "") request.at_least = Number(state.least);
  return request;
}

async function search() {
  running?.abort();
  running = new AbortController();
  const { signal } = running;
  hits = [];
  next = "";
  map?.update();
  byId("more").replaceChildren();
  byId("error").hidden = true;
  const results = byId("results");
  if (!state.terms.some((term) => term.sign > 0)) {
    results.replaceChildren(note("Describe what you look for, or drop an image."));
    byId("status").textContent = state.terms.length ? "A query needs something to look for; minus alone is not enough." : "";
    return;
  }
  // the first of the new results are what one wants to see
  if (results.getBoundingClientRect().top < 0) scrollTo(0, 0);
  results.replaceChildren(...Array.from({ length: 12 }, () => element("li", { className: "waiting", ariaHidden: "true" })));
  byId("status").textContent = "Searching…";
  try {
    const answer = await callJson(indexPath("search"), requestOf(""), signal);
    results.replaceChildren();
    take(answer);
    watchEnd();
    const milliseconds = (answer.embed_milliseconds + answer.search_milliseconds).toFixed(1);
    const cut = answer.cut?.length ? " The text is longer than the model reads; its end was ignored." : "";
    byId("status").textContent = hits.length ? `First ${hits.length} results in ${milliseconds} ms.${cut}` : "";
    if (!hits.length) results.replaceChildren(note(answer.hint || "Nothing matches. Remove a filter or lower the minimum score."));
  } catch (error) {
    if (error.name !== "AbortError") showError(error.message);
  }
}

async function searchMore() {
  if (!next || running?.isMore) return;
  const controller = (running = new AbortController());
  controller.isMore = true;
  byId("more").replaceChildren();
  try {
    take(await callJson(indexPath("search"), requestOf(next), controller.signal));
    byId("status").textContent = `${hits.length} results shown.`;
    watchEnd();
  } catch (error) {
    if (error.name !== "AbortError") showRetry(error.message);
  } finally {
    controller.isMore = false;
  }
}

const endObserver = new IntersectionObserver(
  (entries) => entries.some((entry) => entry.isIntersecting) && searchMore(), { rootMargin: "800px" });

// an observer tells only of changes; begun anew it also tells of an end that is near as it was before
function watchEnd() {
  endObserver.unobserve(byId("more"));
  endObserver.observe(byId("more"));
}

// what is shown stays, and a service in trouble is not asked again by itself
function showRetry(message) {
  const button = element("button", { type: "button" }, "Try again");
  button.addEventListener("click", () => retryMore(hits));
  byId("more").replaceChildren(`More results could not be loaded: ${message} `, button);
}

// the button is gone when it has been pressed; who pressed it by a key goes on at what took its place
async function retryMore(shown) {
  const before = shown.length;
  await searchMore();
  if (hits !== shown || document.activeElement !== document.body) return;
  const next = byId("more").querySelector("button") ?? tiles().get(hits[before]?.uid)?.querySelector("button");
  next?.focus();
}

const tiles = () => new Map([...document.querySelectorAll("#results .tile")].map((node) => [node.dataset.uid, node]));

function take(answer) {
  hits.push(...answer.hits);
  next = answer.next;
  map?.update();
  if (state.sort) showSorted();
  else byId("results").append(...answer.hits.map(tile));
}

// sorting is of what relevance has let through, so that a sort by date does not begin with what nobody asked for
function showSorted() {
  const [name, direction] = state.sort.split("~");
  const order = direction === "down" ? -1 : 1;
  const sorted = [...hits].sort((one, other) => {
    const [a, b] = [readField(one, name), readField(other, name)];
    if (a === null || b === null) return (a === null) - (b === null);
    return order * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
  });
  const shown = tiles();
  const focused = byId("results").contains(document.activeElement) ? document.activeElement : null;
  const { top = 0, bottom = 0 } = focused?.getBoundingClientRect() ?? {};
  byId("results").replaceChildren(...sorted.map((hit) => shown.get(hit.uid) ?? tile(hit)));
  // what is moved loses the focus; it is brought back into view only where it was in it
  focused?.focus({ preventScroll: bottom < 0 || top > innerHeight });
}

function readField(hit, name) {
  if (name === "score" || name === "key") return hit[name];
  return name.split(".").reduce((value, part) => value?.[part], hit.metadata) ?? hit.metadata[name] ?? null;
}

// --- results ----------------------------------------------------------------------------------------------------------

function element(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

const note = (text) => element("li", { className: "empty" }, text);
// captions have a place of their own
const metadataOf = (hit) => Object.entries(hit.metadata).filter(([name]) => !/^captions(_|$)/.test(name));
const captionOf = (hit) => Object.values(hit.captions).find((texts) => texts.length)?.[0] ?? "";

function showError(message) {
  byId("results").replaceChildren();
  byId("status").textContent = "";
  byId("error").textContent = message;
  byId("error").hidden = false;
}

function tile(hit) {
  const caption = captionOf(hit);
  const img = element("img", { alt: caption || hit.uid, loading: "lazy", decoding: "async", width: 320, height: 320 });
  const facts = element("span", { className: "facts" }, element("span", { title: "cosine similarity" }, hit.score.toFixed(3)));
  if (hit.probability !== undefined) facts.append(element("span", { title: "probability of being relevant" }, `${Math.round(100 * hit.probability)}%`));
  if (hit.similar) facts.append(element("span", {}, `+${hit.similar} alike`));
  const button = element("button", { type: "button" }, img,
    element("span", { className: "text" }, element("span", { className: "caption" }, caption || hit.uid), facts));
  const box = element("input", { type: "checkbox", checked: selected.has(hit.uid), ariaLabel: `Select ${caption || hit.uid}` });
  const item = element("li", { className: "tile" }, button, element("label", { className: "check-mark" }, box));
  item.dataset.uid = hit.uid;
  img.addEventListener("error", () => button.classList.add("gone"));
  showImage(img, `${imagePath("thumbnail", hit.uid)}&size=320`);
  button.addEventListener("click", () => showDetail(hit));
  item.classList.toggle("selected", selected.has(hit.uid));
  box.addEventListener("change", () => {
    if (box.checked) selected.set(hit.uid, hit);
    else selected.delete(hit.uid);
    item.classList.toggle("selected", box.checked);
    showSelection();
  });
  return item;
}

function showDetail(hit) {
  const facts = { uid: hit.uid };
  for (const [language, texts] of Object.entries(hit.captions)) if (texts.length) facts[language ? `caption (${language})` : "caption"] = texts.join(" · ");
  for (const [name, value] of metadataOf(hit))
    if (value !== null) facts[name] = typeof value === "object" ? JSON.stringify(value) : String(value);
  if (hit.path) facts.path = hit.path;
  byId("detail-title").textContent = captionOf(hit) || hit.uid;
  // what was found on the map has none
  byId("detail-score").textContent = hit.score === undefined ? "" : `Cosine similarity ${hit.score.toFixed(4)}` + (hit.probability === undefined ? "" : `; relevant with probability ${hit.probability.toFixed(2)}`)
    + (hit.similar ? `; stands for ${hit.similar} near-duplicates` : "");
  showDetailImage(hit);
  resetWhy(hit);
  byId("original").href = imagePath("image", hit.uid);
  byId("original").hidden = Boolean(token.value);
  byId("detail-facts").replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
  const add = (sign) => () => {
    byId("detail").close();
    state.terms = state.terms.filter((term) => term.kind !== "item" || term.value !== hit.uid);
    state.terms.push({ kind: "item", value: hit.uid, sign });
    state.view = "search";
    showView();
    changed();
  };
  byId("like").onclick = add(1);
  byId("unlike").onclick = add(-1);
  byId("detail").showModal();
}

function showDetailImage(hit) {
  byId("detail-image").alt = captionOf(hit) || hit.uid;
  byId("detail-image").removeAttribute("src");
  showImage(byId("detail-image"), `${imagePath("thumbnail", hit.uid)}&size=640`);
}

// --- why ----------------------------------------------------------------------------------------------------------------

let asking = null;

function resetWhy(hit) {
  asking?.abort();
  byId("why-text").value = state.terms.filter((term) => term.kind === "text" && term.sign > 0).map((term) => term.value).join(" ");
  byId("why-status").textContent = "";
  byId("why-words").replaceChildren();
  byId("why").onsubmit = (event) => {
    event.preventDefault();
    explain(hit);
  };
}

async function explain(hit) {
  const text = byId("why-text").value.trim();
  const status = byId("why-status");
  if (!text) {
    status.textContent = "Say what to look for in the image.";
    return;
  }
  asking?.abort();
  asking = new AbortController();
  const { signal } = asking;
  status.textContent = "Looking…";
  try {
    const against = state.terms.filter((term) => term.kind === "text" && term.sign < 0).map((term) => term.value);
    const numWords = text.split(/\s+/).length;
    const words = numWords > 1 && numWords <= MOST_WORDS;
    const answer = await callJson(indexPath("explain"), { item: hit.uid, text, words, against }, signal);
    const image = { label: "Image", show: () => showDetailImage(hit) };
    const maps = [answer, ...answer.words].map((map) => ({ label: map.text, show: () => showHeat(map, against) }));
    showChoices([image, ...maps]);
  } catch (error) {
    if (error.name !== "AbortError") status.textContent = error.message;
  }
}

// the text's own map first
function showChoices(choices) {
  const buttons = choices.map(({ label, show }) => {
    const button = element("button", { type: "button", ariaPressed: "false" }, label);
    button.addEventListener("click", () => {
      byId("why-status").textContent = "";
      for (const other of buttons) other.ariaPressed = String(other === button);
      show();
    });
    return button;
  });
  byId("why-words").replaceChildren(...buttons);
  buttons[1].click();
}

function showHeat(map, against) {
  byId("detail-image").src = map.overlay;
  byId("detail-image").alt = `Heat map of “${map.text}”, hottest ${Math.round(100 * map.peak[0])}% from the left and ${Math.round(100 * map.peak[1])}% from the top`;
  const rather = against.length ? ` rather than for ${against.map((text) => `“${text}”`).join(", ")}` : "";
  byId("why-status").textContent = `“${map.text}”: similarity ${map.similarity.toFixed(4)}, bright where the image speaks for it${rather}.`;
}

// --- selection --------------------------------------------------------------------------------------------------------

function showSelection() {
  byId("selection").hidden = !selected.size;
  byId("selected").textContent = `${selected.size} selected; save as`;
}

function select(items) {
  for (const item of items) if (!selected.has(item.uid)) selected.set(item.uid, item);
  for (const tile of document.querySelectorAll("#results .tile")) {
    const isSelected = selected.has(tile.dataset.uid);
    tile.classList.toggle("selected", isSelected);
    tile.querySelector(".check-mark input").checked = isSelected;
  }
  showSelection();
}

// a spreadsheet runs what begins like a formula
const cell = (value) => `"${String(value ?? "").replace(/^[=+\-@\t\r]/, "'$&").replaceAll('"', '""')}"`;

function save(kind) {
  const rows = [...selected.values()];
  let text = rows.map((hit) => hit.uid).join("\n") + "\n";
  // as vlm curate --filter listed:keys=FILE reads it: samples of several shards that share a key are told apart
  if (kind === "training") text = rows.map((hit) => (hit.uid.startsWith(`${hit.key}@`) ? hit.uid : hit.key)).join("\n") + "\n";
  if (kind === "json") text = JSON.stringify(rows, null, 1);
  if (kind === "csv") {
    const names = [...new Set(rows.flatMap((hit) => metadataOf(hit).map(([name]) => name)))];
    const lines = rows.map((hit) => [hit.uid, hit.score, captionOf(hit), ...names.map((name) => {
      const value = hit.metadata[name];
      return value !== null && typeof value === "object" ? JSON.stringify(value) : value;
    })]);
    text = [["uid", "score", "caption", ...names], ...lines].map((line) => line.map(cell).join(",")).join("\r\n");
  }
  const name = { selection: "uids.txt", training: "keys.txt", csv: "selection.csv", json: "selection.json" }[kind];
  const link = element("a", { href: URL.createObjectURL(new Blob([text])), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// --- controls ---------------------------------------------------------------------------------------------------------

function showControls() {
  byId("terms").replaceChildren(...state.terms.map(chip));
  byId("words").value = state.words;
  byId("fold").checked = state.fold;
  byId("relevant").checked = state.relevant;
  byId("least").value = state.least;
  byId("sort").value = state.sort;
  byId("index").value = state.index;
  const active = Object.values(state.values).filter((values) => values.length).length
    + Object.values(state.ranges).filter((ends) => ends.some(Boolean)).length
    + [state.words, state.fold, state.relevant, state.least, state.sort].filter(Boolean).length;
  byId("active").hidden = !active;
  byId("active").textContent = active;
  for (const box of document.querySelectorAll("#filters input[type=checkbox]"))
    box.checked = (state.values[box.dataset.field] ?? []).includes(JSON.parse(box.value));
  for (const input of document.querySelectorAll("#filters input[type=number]"))
    input.value = state.ranges[input.dataset.field]?.[Number(input.dataset.end)] ?? "";
}

function chip(term) {
  const name = term.kind === "text" ? term.value : term.kind === "item" ? `like ${term.value}` : term.value;
  const remove = element("button", { type: "button", ariaLabel: `Remove ${name}` }, "×");
  remove.addEventListener("click", () => {
    state.terms = state.terms.filter((other) => other !== term);
    changed();
    byId("query").focus();
  });
  const node = element("li", { className: term.sign < 0 ? "term minus" : "term" });
  if (term.kind !== "text") {
    const img = element("img", { alt: "" });
    if (term.kind === "image") img.src = term.image;
    else showImage(img, `${imagePath("thumbnail", term.value)}&size=160`);
    node.append(img);
  }
  node.append(element("span", { className: "name" }, (term.sign < 0 ? "− " : "") + name), remove);
  return node;
}

async function loadIndex() {
  const { index } = state;
  const known = (await callJson(indexPath("fields"))).fields;
  const categories = known.filter((field) => field.is_category && field.distinct > 1 && field.distinct <= 200 && field.name !== "caption");
  const names = categories.slice(0, 20).map((field) => field.name);
  const facets = names.length ? (await callJson(indexPath("facets"), { fields: names, top: MOST_VALUES })).facets : {};
  // another index was chosen meanwhile
  if (index !== state.index) return;
  fields = known;
  const sortable = fields.filter((field) => !["caption", "language"].includes(field.name));
  byId("sort").replaceChildren(new Option("relevance", ""), ...sortable.flatMap((field) => [
    new Option(`${field.name} ↑`, `${field.name}~up`), new Option(`${field.name} ↓`, `${field.name}~down`)]));
  const ranges = fields.filter((field) => field.minimum !== null && !names.includes(field.name)).slice(0, 20);
  byId("filters").replaceChildren(...names.map((name) => valueFilter(name, facets[name])), ...ranges.map(rangeFilter));
  map?.reset();
  showControls();
}

function valueFilter(name, counts) {
  const values = element("div", { className: "values" });
  for (const { value, rows } of counts) {
    const box = element("input", { type: "checkbox", value: JSON.stringify(value) });
    box.dataset.field = name;
    box.addEventListener("change", () => {
      const others = (state.values[name] ?? []).filter((other) => other !== value);
      state.values[name] = box.checked ? [...others, value] : others;
      changed();
    });
    values.append(element("label", {}, box, String(value), element("span", {}, rows.toLocaleString("en"))));
  }
  return element("fieldset", {}, element("legend", {}, name), values);
}

function rangeFilter(field) {
  const ends = [["at least", field.minimum], ["at most", field.maximum]].map(([label, placeholder], end) => {
    const input = element("input", { type: "number", step: "any", placeholder, ariaLabel: `${field.name} ${label}` });
    Object.assign(input.dataset, { field: field.name, end });
    input.addEventListener("change", () => {
      (state.ranges[field.name] ??= ["", ""])[end] = input.value;
      changed();
    });
    return input;
  });
  return element("fieldset", {}, element("legend", {}, field.name), element("div", { className: "range" }, ends[0], "–", ends[1]));
}

function addText(text) {
  const isMinus = /^[-−]\s*\S/.test(text);
  const value = text.replace(/^[-−]\s*/, "").trim();
  if (value) state.terms.push({ kind: "text", value, sign: isMinus ? -1 : 1 });
}

const readFile = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(file);
});

async function addFiles(files) {
  // copied before the wait: a drop's files are gone when its event is over
  const uploads = [...files];
  if (!(await ready())) return;
  for (const file of uploads) {
    if (!file.type.startsWith("image/")) continue;
    state.terms.push({ kind: "image", value: file.name || "image", sign: 1, image: await readFile(file) });
  }
  changed();
}

// --- classify ---------------------------------------------------------------------------------------------------------

async function classify(event) {
  event.preventDefault();
  const problem = byId("classify-error");
  problem.hidden = true;
  const classes = byId("classes").value.split("\n").map((line) => line.trim()).filter(Boolean);
  const files = [...byId("classify-file").files];
  if (!(await ready())) return;
  try {
    if (classes.length < 2) throw new Error("Name two classes or more, one a line.");
    if (!files.length) throw new Error("Choose one image or more.");
    const images = await Promise.all(files.map(readFile));
    const { results } = await callJson(indexPath("classify"), { images, classes });
    byId("classified").replaceChildren(...results.map((result, number) => classified(files[number].name, images[number], result.classes)));
  } catch (error) {
    problem.textContent = error.message;
    problem.hidden = false;
  }
}

function classified(name, image, classes) {
  const rows = classes.map(({ name: label, probability }) => {
    const bar = element("progress", { value: probability, max: 1, ariaLabel: label });
    return element("tr", {}, element("td", {}, label), element("td", {}, bar), element("td", {}, `${(100 * probability).toFixed(1)}%`));
  });
  return element("li", {}, element("img", { src: image, alt: name }), element("table", {}, element("tbody", {}, ...rows)));
}

// --- start ------------------------------------------------------------------------------------------------------------

function showView() {
  for (const name of VIEWS) {
    const isShown = name === state.view;
    byId(`view-${name}`).hidden = !isShown;
    byId(`tab-${name}`).ariaSelected = String(isShown);
    byId(`tab-${name}`).tabIndex = isShown ? 0 : -1;
  }
  byId("query-parts").hidden = state.view === "classify";
  if (state.view === "map") showMap().catch(showMapError);
}

async function goTo(name) {
  if (!(await ready())) return;
  state.view = name;
  showView();
  writeAddress();
}

// the map's code is fetched when it is first looked at
async function showMap() {
  if (!map) {
    const { createMap } = await import("./map.js");
    map ??= createMap({
      byId, element, callJson, indexPath, imagePath, showImage, showDetail, captionOf, filterText, select, state, mapRows,
      hits: () => hits,
      fields: () => fields,
      searchLike(uids) {
        state.terms = uids.map((uid) => ({ kind: "item", value: uid, sign: 1 }));
        state.view = "search";
        showView();
        changed();
      },
    });
    map.reset();
  }
  // it may have been made since the page was opened
  if (!mapRows()) ({ indexes } = await callJson(`${API}/indexes`));
  map.update();
}

function showMapError(error) {
  byId("map-error").textContent = error instanceof TypeError ? "The map cannot be loaded: the server cannot be reached." : error.message;
  byId("map-error").hidden = false;
}

const mapRows = () => indexes.find((index) => index.name === state.index)?.map_rows ?? 0;

function moveAmongResults(event) {
  const buttons = [...document.querySelectorAll("#results .tile > button")];
  const at = buttons.indexOf(document.activeElement);
  if (at < 0) return;
  const perRow = buttons.filter((button) => button.getBoundingClientRect().top === buttons[0].getBoundingClientRect().top).length;
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: perRow, ArrowUp: -perRow }[event.key];
  const target = buttons[at + step];
  if (target) {
    event.preventDefault();
    target.focus();
  }
}

function listen() {
  byId("form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const text = byId("query").value;
    byId("query").value = "";
    if (!(await ready())) {
      byId("query").value = text;
      return;
    }
    addText(text);
    changed();
  });
  byId("query").addEventListener("keydown", (event) => {
    if (event.key === "Backspace" && !event.target.value && state.terms.length) {
      state.terms.pop();
      changed();
    }
  });
  byId("file").addEventListener("change", (event) => addFiles(event.target.files).then(() => (event.target.value = "")));
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) addFiles(event.clipboardData.files);
  });
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      byId("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
      if (kind === "drop") addFiles(event.dataTransfer.files);
    });
  }
  for (const [id, read] of [["words", (node) => node.value.trim()], ["fold", (node) => node.checked], ["relevant", (node) => node.checked], ["least", (node) => node.value], ["sort", (node) => node.value]]) {
    byId(id).addEventListener("change", (event) => {
      state[id] = read(event.target);
      changed();
    });
  }
  byId("index").addEventListener("change", async (event) => {
    Object.assign(state, { index: event.target.value, values: {}, ranges: {}, sort: "", terms: state.terms.filter((term) => term.kind !== "item") });
    await loadIndex().catch((error) => showError(error.message));
    changed();
  });
  for (const button of document.querySelectorAll("[data-save]")) button.addEventListener("click", () => save(button.dataset.save));
  byId("clear").addEventListener("click", () => {
    selected.clear();
    showSelection();
    for (const box of document.querySelectorAll(".check-mark input:checked")) box.click();
  });
  document.addEventListener("keydown", async (event) => {
    if (event.key === "/" && !/^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName)) {
      event.preventDefault();
      if (state.view === "classify") await goTo("search");
      byId("query").focus();
    }
    if (event.key.startsWith("Arrow")) moveAmongResults(event);
  });
  for (const [at, name] of VIEWS.entries()) {
    byId(`tab-${name}`).addEventListener("click", () => goTo(name));
    byId(`tab-${name}`).addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: VIEWS.length - 1 }[event.key];
      if (!step) return;
      const other = VIEWS[(at + step) % VIEWS.length];
      goTo(other);
      byId(`tab-${other}`).focus();
    });
  }
  byId("classify").addEventListener("submit", classify);
  byId("classify-file").addEventListener("change", (event) => (byId("chosen").textContent = `${event.target.files.length} chosen`));
  addEventListener("popstate", async () => {
    if (!(await ready())) return;
    const { index } = state;
    readAddress();
    if (state.index !== index) await loadIndex().catch((error) => showError(error.message));
    showControls();
    showView();
    search();
  });
}

async function start() {
  byId("error").hidden = true;
  try {
    ({ indexes } = await callJson(`${API}/indexes`));
    byId("index").replaceChildren(...indexes.map((index) => new Option(`${index.name} (${index.rows.toLocaleString("en")})`, index.name)));
    byId("index-picker").hidden = indexes.length < 2;
    document.title = indexes.length > 1 ? "Search images" : `Search ${indexes[0].name}`;
    readAddress();
    await loadIndex();
    hasStarted = true;
    showView();
    search();
  } catch (error) {
    showError(error.message);
  }
}

// what is asked before the indexes are known waits: reading the address would overwrite it, or find it overwritten
async function ready() {
  await started;
  if (!hasStarted) await (started = start());
  return hasStarted;
}

listen();
let hasStarted = false;
let started = start();

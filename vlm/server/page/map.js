// The map tab: points on a canvas, moved by mouse, touch and keyboard; the server gives them region by region.

const MOST_POINTS = 3000;
const MOST_LISTED = 24;
const MOST_LIKE = 8;
const REACH = 16;
const SHAPES = [
  "M1 0A1 1 0 1 1-1 0A1 1 0 1 1 1 0Z", "M-.9-.9H.9V.9H-.9Z", "M0-1.2L1.1.8H-1.1Z", "M0-1.3L1 0L0 1.3L-1 0Z",
  "M-.4-1.2H.4V-.4H1.2V.4H.4V1.2H-.4V.4H-1.2V-.4H-.4Z", "M0 1.2L1.1-.8H-1.1Z",
  "M0-1.4L.4-.45L1.35-.45L.6.2L.85 1.15L0 .6L-.85 1.15L-.6.2L-1.35-.45L-.4-.45Z",
  "M-1.2-.7L-.7-1.2L0-.5L.7-1.2L1.2-.7L.5 0L1.2.7L.7 1.2L0 .5L-.7 1.2L-1.2.7L-.5 0Z",
];
const OTHER = "M.7 0A.7.7 0 1 1-.7 0A.7.7 0 1 1 .7 0Z";
const PATHS = new Map([...SHAPES, OTHER].map((shape) => [shape, new Path2D(shape)]));

// page: what the search page lends: requests, elements, its state, and what becomes of an image that is chosen
export function createMap(page) {
  const { byId, element, callJson, indexPath, imagePath, showImage } = page;
  const canvas = byId("map-canvas");
  const context = canvas.getContext("2d");
  const view = { x: 0, y: 0, scale: 0, width: 0, height: 0 };
  const pointers = new Map();
  const items = new Map();
  let answer = null;
  let wanted = "";
  let covered = null;
  let loading = null;
  let timer = 0;
  let only = null;
  let lasso = null;
  let inLasso = [];
  let current = -1;
  let moved = 0;
  let isShown = false;

  // --- view ---------------------------------------------------------------------------------------------------------

  const toScreen = (x, y) => [(x - view.x) * view.scale + view.width / 2, (view.y - y) * view.scale + view.height / 2];
  const toMap = (x, y) => [(x - view.width / 2) / view.scale + view.x, view.y - (y - view.height / 2) / view.scale];
  const fitScale = () => {
    const [left, bottom, right, top] = answer?.bounds ?? [-1, -1, 1, 1];
    return Math.min(view.width / Math.max(right - left, 0.1), view.height / Math.max(top - bottom, 0.1)) / 1.1;
  };

  function goHome() {
    const [left, bottom, right, top] = answer?.bounds ?? [-1, -1, 1, 1];
    Object.assign(view, { x: (left + right) / 2, y: (bottom + top) / 2, scale: fitScale() });
    moving();
  }

  function zoom(factor, x = view.width / 2, y = view.height / 2) {
    const [mapX, mapY] = toMap(x, y);
    view.scale = Math.min(Math.max(view.scale * factor, fitScale() / 2), fitScale() * 4000);
    // what is under the pointer stays there
    const [newX, newY] = toMap(x, y);
    move((newX - mapX) * view.scale, (mapY - newY) * view.scale);
  }

  function move(right, down) {
    view.x = Math.min(Math.max(view.x - right / view.scale, -1.2), 1.2);
    view.y = Math.min(Math.max(view.y + down / view.scale, -1.2), 1.2);
    moving();
  }

  function moving() {
    draw();
    clearTimeout(timer);
    timer = setTimeout(load, answer ? 150 : 0);
  }

  function resize() {
    const { clientWidth: width, clientHeight: height } = canvas;
    if (!width || !height) return;
    const isFirst = !view.width;
    const share = isFirst ? 1 : view.scale / fitScale();
    Object.assign(view, { width, height });
    canvas.width = width * devicePixelRatio;
    canvas.height = height * devicePixelRatio;
    view.scale = fitScale() * share;
    moving();
  }

  // --- points -------------------------------------------------------------------------------------------------------

  const box = (margin) => {
    const width = (0.5 + margin) * view.width / view.scale, height = (0.5 + margin) * view.height / view.scale;
    return [view.x - width, view.y - height, view.x + width, view.y + height];
  };
  const isWithin = (inner, outer) => inner[0] >= outer[0] && inner[1] >= outer[1] && inner[2] <= outer[2] && inner[3] <= outer[3];

  async function load() {
    if (!isShown || !view.width) return;
    const hits = page.hits().slice(0, 200).map((hit) => hit.uid);
    const query = JSON.stringify([page.state.index, byId("map-colour").value, page.filterText(), hits]);
    // nothing to ask for where all points are here already, or the same region was shown
    const hasAll = answer && answer.points.uids.length === answer.inside;
    if (query === wanted && covered && isWithin(box(0), covered.box) && (hasAll || covered.scale === view.scale)) return;
    loading?.abort();
    loading = new AbortController();
    const isFirst = !answer;
    const region = isFirst ? [-9, -9, 9, 9] : box(0.3);
    const { scale } = view;
    const request = { box: region, top: MOST_POINTS, colour: byId("map-colour").value, where: page.filterText(), uids: hits };
    try {
      const newest = await callJson(indexPath("map"), request, loading.signal);
      const legendBefore = answer && JSON.stringify(answer.legend);
      // the points have other numbers now; what the lasso holds is shown as far as it is still here
      const held = new Set(chosenUids());
      answer = newest;
      inLasso = answer.points.uids.flatMap((uid, number) => (held.has(uid) ? [number] : []));
      showChosen();
      covered = { box: region, scale };
      wanted = query;
      current = -1;
      if (isFirst) {
        goHome();
        covered.scale = view.scale;
      }
      byId("map-error").hidden = true;
      if (JSON.stringify(answer.legend) !== legendBefore) showLegend();
      showStatus();
      draw();
      if (byId("map-list").open) fillList();
    } catch (error) {
      if (error.name === "AbortError") return;
      byId("map-error").textContent = error.message;
      byId("map-error").hidden = false;
    }
  }

  function showStatus() {
    const { points, inside, places, unplaced } = answer;
    const count = (number) => number.toLocaleString("en");
    let text = points.uids.length < inside
      ? `${count(points.uids.length)} of ${count(inside)} images of this region are shown; zoom in for more.`
      : `${count(inside)} images in this region.`;
    const hits = page.hits().length;
    if (hits) text += ` ${count(Object.keys(places).length)} of ${count(hits)} results are marked.`;
    if (unplaced) text += ` ${count(unplaced)} new images have no place yet: vlm index map makes the map anew.`;
    byId("map-status").textContent = text;
  }

  const isVisible = (number) => only === null || answer.points.values[number] === only;

  function nearest(x, y, reach) {
    let best = -1;
    let bestDistance = reach * reach;
    const { points } = answer;
    for (let number = 0; number < points.uids.length; number++) {
      if (!isVisible(number)) continue;
      const [right, down] = toScreen(points.x[number], points.y[number]);
      const distance = (right - x) ** 2 + (down - y) ** 2;
      if (distance < bestDistance) [best, bestDistance] = [number, distance];
    }
    return best;
  }

  // --- drawing ------------------------------------------------------------------------------------------------------

  function draw() {
    if (!view.width) return;
    const style = getComputedStyle(canvas);
    const colour = (name) => style.getPropertyValue(name).trim();
    context.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    context.clearRect(0, 0, view.width, view.height);
    if (!answer) return;
    const { points, places } = answer;
    const marked = Object.values(places);
    const radius = Math.min(6, 3 + 40 / Math.sqrt(points.uids.length + 1));
    const held = new Set(inLasso);
    const dimmed = held.size ? 0.2 : marked.length ? 0.5 : 0.85;
    for (let number = 0; number < points.uids.length; number++) {
      if (!isVisible(number)) continue;
      const value = points.values[number];
      context.globalAlpha = held.has(number) ? 1 : dimmed;
      context.fillStyle = colourOf(value, colour);
      drawShape(value < 0 ? OTHER : SHAPES[value], points.x[number], points.y[number], radius);
    }
    context.globalAlpha = 1;
    context.lineWidth = 2;
    for (const [x, y] of marked) drawRing(x, y, radius + 1.5, colour("--accent"), colour("--ink"));
    if (current >= 0) drawRing(points.x[current], points.y[current], radius + 6, "", colour("--accent"));
    if (lasso?.length) drawLasso(colour("--accent"));
    if (document.activeElement === canvas && canvas.matches(":focus-visible")) drawCross(colour("--ink"));
  }

  const colourOf = (value, colour) => {
    if (!answer.legend.length) return colour("--map-0");
    return colour(value < 0 ? "--soft" : `--map-${value}`);
  };

  function drawShape(shape, x, y, radius) {
    const [right, down] = toScreen(x, y);
    if (right < -9 || down < -9 || right > view.width + 9 || down > view.height + 9) return;
    context.save();
    context.translate(right, down);
    context.scale(radius, radius);
    context.fill(PATHS.get(shape));
    context.restore();
  }

  function drawRing(x, y, radius, fill, line) {
    context.beginPath();
    context.arc(...toScreen(x, y), radius, 0, 2 * Math.PI);
    context.strokeStyle = line;
    if (fill) {
      context.fillStyle = fill;
      context.fill();
    }
    context.stroke();
  }

  function drawLasso(line) {
    context.beginPath();
    for (const [x, y] of lasso) context.lineTo(...toScreen(x, y));
    context.closePath();
    context.strokeStyle = line;
    context.setLineDash([6, 4]);
    context.stroke();
    context.setLineDash([]);
  }

  function drawCross(line) {
    const [x, y] = [view.width / 2, view.height / 2];
    context.beginPath();
    context.moveTo(x - 9, y);
    context.lineTo(x + 9, y);
    context.moveTo(x, y - 9);
    context.lineTo(x, y + 9);
    context.strokeStyle = line;
    context.stroke();
  }

  function showLegend() {
    only = null;
    const numbers = answer.legend.map((_, number) => number);
    if (answer.legend.length) numbers.push(-1);
    byId("map-legend").replaceChildren(...numbers.map((number) => {
      const button = element("button", { type: "button", ariaPressed: "false" }, mark(number));
      if (number < 0) button.append("other or none");
      else button.append(`${answer.legend[number].value} `, element("span", { className: "soft" }, answer.legend[number].rows.toLocaleString("en")));
      button.addEventListener("click", () => {
        only = only === number ? null : number;
        for (const [at, item] of [...byId("map-legend").children].entries())
          item.firstChild.ariaPressed = String(only !== null && numbers[at] === only);
        draw();
      });
      return element("li", {}, button);
    }));
  }

  function mark(number) {
    const svg = byId("map-mark").content.firstElementChild.cloneNode(true);
    svg.classList.add(`mark-${number < 0 ? "other" : number}`);
    svg.firstElementChild.setAttribute("d", number < 0 ? OTHER : SHAPES[number]);
    return svg;
  }

  // --- one image ----------------------------------------------------------------------------------------------------

  async function itemOf(uid) {
    if (!items.has(uid)) {
      items.set(uid, callJson(indexPath("items"), { uids: [uid] }).then((found) => found.items[0]));
      items.get(uid).catch(() => items.delete(uid));
    }
    return items.get(uid);
  }

  async function showCard(number) {
    const card = byId("map-card");
    if (number === current && !card.hidden) return;
    current = number;
    draw();
    card.hidden = number < 0;
    if (number < 0) return;
    const uid = answer.points.uids[number];
    const [x, y] = toScreen(answer.points.x[number], answer.points.y[number]);
    card.style.left = `${Math.min(Math.max(x + 14, 4), Math.max(view.width - 190, 4))}px`;
    card.style.top = `${Math.min(Math.max(y + 14, 4), Math.max(view.height - 220, 4))}px`;
    card.dataset.uid = uid;
    byId("map-card-image").removeAttribute("src");
    byId("map-card-text").textContent = uid;
    // points that are only passed over are not asked for
    await new Promise((resolve) => setTimeout(resolve, 80));
    if (card.dataset.uid !== uid || card.hidden) return;
    showImage(byId("map-card-image"), `${imagePath("thumbnail", uid)}&size=160`);
    try {
      const item = await itemOf(uid);
      if (card.dataset.uid === uid) byId("map-card-text").textContent = page.captionOf(item) || uid;
    } catch (error) {
      if (card.dataset.uid === uid) byId("map-card-text").textContent = error.message;
    }
  }

  function hideCard() {
    current = -1;
    byId("map-card").hidden = true;
    draw();
  }

  async function openDetail(uid) {
    try {
      page.showDetail(await itemOf(uid));
    } catch (error) {
      byId("map-status").textContent = error.message;
    }
  }

  // --- several images -----------------------------------------------------------------------------------------------

  function endLasso() {
    const polygon = lasso;
    lasso = null;
    inLasso = [];
    if (polygon.length > 2)
      for (let number = 0; number < answer.points.uids.length; number++)
        if (isVisible(number) && isInside(answer.points.x[number], answer.points.y[number], polygon)) inLasso.push(number);
    showChosen();
  }

  // a ray to the right crosses the outline of a polygon an odd number of times from within
  function isInside(x, y, polygon) {
    let inside = false;
    for (let at = 0, before = polygon.length - 1; at < polygon.length; before = at++) {
      const [[x1, y1], [x2, y2]] = [polygon[at], polygon[before]];
      if (y1 > y !== y2 > y && x < ((x2 - x1) * (y - y1)) / (y2 - y1) + x1) inside = !inside;
    }
    return inside;
  }

  const chosenUids = () => inLasso.map((number) => answer.points.uids[number]);

  function showChosen() {
    byId("map-chosen").hidden = !inLasso.length;
    byId("map-count").textContent = `${inLasso.length.toLocaleString("en")} images in the lasso`;
    draw();
    if (byId("map-list").open) fillList();
  }

  function clearLasso() {
    lasso = null;
    inLasso = [];
    showChosen();
  }

  async function fetchItems(uids) {
    const found = [];
    for (let first = 0; first < uids.length; first += 1000)
      found.push(...(await callJson(indexPath("items"), { uids: uids.slice(first, first + 1000) })).items);
    return found;
  }

  // what a screen reader has in place of the canvas
  async function fillList() {
    if (!answer) return;
    let uids = chosenUids();
    if (!uids.length) {
      const [left, bottom, right, top] = box(0);
      const { points } = answer;
      uids = points.uids.filter((_, number) => isVisible(number) && points.x[number] >= left && points.x[number] <= right
        && points.y[number] >= bottom && points.y[number] <= top);
    }
    const shown = uids.slice(0, MOST_LISTED);
    const found = shown.length ? await fetchItems(shown).catch(() => []) : [];
    byId("map-items").replaceChildren(...found.map((item) => {
      const image = element("img", { alt: "", loading: "lazy", width: 48, height: 48 });
      showImage(image, `${imagePath("thumbnail", item.uid)}&size=160`);
      const button = element("button", { type: "button" }, image, element("span", {}, page.captionOf(item) || item.uid));
      button.addEventListener("click", () => page.showDetail(item));
      return element("li", {}, button);
    }));
    byId("map-listed").textContent = `${found.length} of ${uids.length.toLocaleString("en")} images in ${inLasso.length ? "the lasso" : "view"}`;
  }

  // --- pointers and keys --------------------------------------------------------------------------------------------

  const at = (event) => [event.offsetX, event.offsetY];

  function pointerDown(event) {
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, at(event));
    moved = pointers.size > 1 ? Infinity : 0;
    if (pointers.size > 1) lasso = null;
    else if (event.shiftKey || byId("map-lasso").ariaPressed === "true") lasso = [toMap(...at(event))];
  }

  function pointerMove(event) {
    if (!answer) return;
    const before = pointers.get(event.pointerId);
    if (!before) {
      showCard(nearest(...at(event), REACH));
      return;
    }
    const [x, y] = at(event);
    moved += Math.hypot(x - before[0], y - before[1]);
    if (lasso) {
      lasso.push(toMap(x, y));
      draw();
    } else if (pointers.size === 2) {
      const [other] = [...pointers].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
      const spread = (place) => Math.max(Math.hypot(place[0] - other[0], place[1] - other[1]), 1);
      zoom(spread([x, y]) / spread(before), (x + other[0]) / 2, (y + other[1]) / 2);
      move((x - before[0]) / 2, (y - before[1]) / 2);
    } else if (moved > 4) {
      hideCard();
      move(x - before[0], y - before[1]);
    }
    pointers.set(event.pointerId, [x, y]);
  }

  function pointerUp(event) {
    if (!pointers.delete(event.pointerId) || !answer) return;
    if (lasso) {
      endLasso();
    } else if (moved <= 4 && event.type === "pointerup") {
      const isMouse = event.pointerType === "mouse";
      const number = nearest(...at(event), isMouse ? REACH : 1.5 * REACH);
      showCard(number);
      // a finger has no hover: it sees the card first, which opens the rest
      if (number >= 0 && isMouse) openDetail(answer.points.uids[number]);
    }
  }

  function keyDown(event) {
    const step = 60;
    const actions = {
      ArrowLeft: () => move(step, 0), ArrowRight: () => move(-step, 0), ArrowUp: () => move(0, step), ArrowDown: () => move(0, -step),
      "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), 0: goHome,
      Escape: () => (clearLasso(), hideCard()),
      Enter: () => current >= 0 && openDetail(answer.points.uids[current]),
    };
    if (event.ctrlKey || event.metaKey || event.altKey || !actions[event.key]) return;
    event.preventDefault();
    event.stopPropagation();
    actions[event.key]();
    if (event.key.startsWith("Arrow") || /^[-+=0]$/.test(event.key)) chooseCentre();
  }

  // the keyboard's pointer is the middle
  function chooseCentre() {
    if (!answer) return;
    const number = nearest(view.width / 2, view.height / 2, Infinity);
    showCard(number);
    if (number < 0) return;
    const uid = answer.points.uids[number];
    itemOf(uid).then((item) => {
      if (byId("map-card").dataset.uid === uid) byId("map-status").textContent = `Nearest to the middle: ${page.captionOf(item) || uid}`;
    }).catch(() => {});
  }

  function listen() {
    canvas.addEventListener("pointerdown", pointerDown);
    canvas.addEventListener("pointermove", pointerMove);
    canvas.addEventListener("pointerup", pointerUp);
    canvas.addEventListener("pointercancel", pointerUp);
    canvas.addEventListener("pointerleave", (event) => {
      if (event.pointerType === "mouse" && !event.relatedTarget?.closest("#map-card")) hideCard();
    });
    byId("map-card").addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hideCard());
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      zoom(Math.exp(-event.deltaY / (event.deltaMode ? 12 : 400)), ...at(event));
    }, { passive: false });
    canvas.addEventListener("keydown", keyDown);
    canvas.addEventListener("focus", draw);
    canvas.addEventListener("blur", draw);
    new ResizeObserver(resize).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    byId("map-card").addEventListener("click", () => openDetail(byId("map-card").dataset.uid));
    byId("map-in").addEventListener("click", () => zoom(1.6));
    byId("map-out").addEventListener("click", () => zoom(1 / 1.6));
    byId("map-home").addEventListener("click", goHome);
    byId("map-colour").addEventListener("change", load);
    byId("map-list").addEventListener("toggle", () => byId("map-list").open && fillList());
    byId("map-lasso").addEventListener("click", () => {
      byId("map-lasso").ariaPressed = String(byId("map-lasso").ariaPressed !== "true");
    });
    byId("map-clear").addEventListener("click", clearLasso);
    byId("map-like").addEventListener("click", () => {
      const uids = chosenUids();
      const step = Math.max(1, Math.floor(uids.length / MOST_LIKE));
      page.searchLike(uids.filter((_, number) => number % step === 0).slice(0, MOST_LIKE));
    });
    byId("map-select").addEventListener("click", async () => {
      try {
        page.select(await fetchItems(chosenUids()));
      } catch (error) {
        byId("map-status").textContent = error.message;
      }
    });
  }

  listen();
  return {
    // another query, filter or index, or the tab has just been opened
    update() {
      const rows = page.mapRows();
      byId("map-parts").hidden = !rows;
      byId("map-none").hidden = rows > 0;
      isShown = rows > 0 && page.state.view === "map";
      if (!isShown) return;
      resize();
      load();
    },
    reset() {
      answer = covered = null;
      wanted = "";
      items.clear();
      clearLasso();
      hideCard();
      byId("map-legend").replaceChildren();
      const names = page.fields().filter((field) => field.is_category && field.distinct > 1 && field.distinct <= 200 && field.name !== "caption").map((field) => field.name);
      byId("map-colour").replaceChildren(new Option("nothing", ""), ...names.map((name) => new Option(name, name)));
      if (view.width) goHome();
    },
  };
}

// The review page. Every text from the run is set with textContent: captions hold scripts.
"use strict";

const $ = (selector, root = document) => root.querySelector(selector);
const FILTERS = ["words", "keep", "reason", "source", "itm_min", "itm_max", "itc_min", "itc_max",
  "review", "changes", "shard", "key", "order", "desc", "seed"];
const SEARCH = ["near", "near_text", "near_upload", "find"];
const PLACE = ["after", "before"];
const TRIED = ["t_itm", "t_itc", "t_synthetic_itm", "t_synthetic_itc"];
const RANDOM = ["random", "high"];  // the orders that a seed shuffles
const VERDICTS = [["right", "Right", "y"], ["wrong", "Wrong", "n"], ["unsure", "Unsure", "u"]];
const PAGE_SIZE = matchMedia("(max-width: 760px)").matches ? 12 : 24;

const state = Object.fromEntries(new URLSearchParams(location.search));
let summary = null;
let page = null;        // what the server answered last
let current = 0;        // index of the card that keys act on
let ahead = null;       // {url, promise}: the next page, fetched while this one is looked at
let asked = 0;          // number of the latest request for a page
let looked = 0;         // number of the latest request for details
let toastTimer = 0;
let writes = Promise.resolve();   // verdicts are stored one after another

// ---- small helpers ---------------------------------------------------------------------------

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value == null) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const count = (number) => Number(number).toLocaleString("en");
const pairs = (number) => `${count(number)} ${number === 1 ? "pair" : "pairs"}`;
const score = (value) => (value == null ? "–" : Number(value).toFixed(3));
const percent = (value) => `${(100 * value).toFixed(1)} %`;

function toast(text) {
  $("#toast").textContent = text;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => { $("#toast").textContent = ""; }, 5000);
}

function problem(text) {
  $("#problem").hidden = !text;
  $("#problem").textContent = text || "";
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer; is `capfilt inspect` still running?");
  }
  const values = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(values.error || `the server answered ${response.status}`);
  return values;
}

function send(path, body, type = "application/json") {
  const headers = { "content-type": type, "x-capfilt": "1" };
  return ask(path, { method: "POST", headers, body });
}

function memory(name, value) {
  try {   // storage may be switched off
    if (value === undefined) return localStorage.getItem(name);
    localStorage.setItem(name, value);
  } catch { /* then the name is asked again next time */ }
  return null;
}

const reviewer = () => $("#reviewer").value.trim();

function parameters(names) {
  const chosen = new URLSearchParams();
  for (const name of names) if (state[name]) chosen.set(name, state[name]);
  return chosen;
}

function storeState() {
  const query = parameters([...FILTERS, ...SEARCH, ...PLACE, ...TRIED, "score"]).toString();
  history.replaceState(null, "", query ? `?${query}` : location.pathname);
}

// ---- pages of pairs --------------------------------------------------------------------------

function pageUrl(place) {
  const query = parameters([...FILTERS, ...SEARCH, ...TRIED]);
  for (const [name, value] of Object.entries(place)) if (value) query.set(name, value);
  query.set("limit", PAGE_SIZE);
  if (reviewer()) query.set("reviewer", reviewer());
  return `/api/pairs?${query}`;
}

async function load({ focus = null } = {}) {
  storeState();
  showFilters();
  const mine = ++asked;
  const url = pageUrl({ after: state.after, before: state.before });
  $("#grid").setAttribute("aria-busy", "true");
  try {
    const found = await (ahead?.url === url ? ahead.promise : ask(url));
    if (mine !== asked) return;
    problem("");
    show(found, focus);
  } catch (error) {
    if (mine !== asked) return;
    problem(error.message);
    show({ pairs: [], total: 0, next: null, previous: null, sampling: "" }, null);
    $("#total").textContent = "Nothing to show";
  } finally {
    if (mine === asked) $("#grid").removeAttribute("aria-busy");
  }
}

function show(found, focus) {
  page = found;
  if (found.changed) $("#changed").hidden = false;
  $("#total").textContent = pairs(found.total);
  $("#sampling").textContent = {
    random: "random sample: labels count for the estimate", threshold: "sample near the threshold",
    uncertain: "sample of the most uncertain", high: "random sample of the high scores",
  }[found.sampling] || "";
  for (const button of document.querySelectorAll(".next")) button.disabled = !found.next;
  for (const button of document.querySelectorAll(".previous")) button.disabled = !found.previous;
  const cards = found.pairs.map((pair, index) => make("li", {}, card(pair, index)));
  if (!cards.length && $("#problem").hidden) {
    cards.push(make("li", {}, make("p", {}, "No pair fits these filters.")));
  }
  $("#grid").replaceChildren(...cards);
  mark(focus === "last" ? found.pairs.length - 1 : 0, focus !== null);
  performance.mark("capfilt:screen");
  fetchAhead();
}

function fetchAhead() {
  ahead = null;
  if (!page.next) return;
  const url = pageUrl({ after: page.next });
  const promise = ask(url);
  promise.then((found) => {
    for (const pair of found.pairs) if (pair.has_image) new Image().src = imageUrl(pair.key);
  }).catch(() => { if (ahead?.url === url) ahead = null; });
  ahead = { url, promise };
}

function turn(direction, focus = null) {
  const cursor = direction === "next" ? page?.next : page?.previous;
  if (!cursor) return false;
  state.after = direction === "next" ? cursor : "";
  state.before = direction === "next" ? "" : cursor;
  scrollTo({ top: $("#total").getBoundingClientRect().top + scrollY - 12 });
  load({ focus });
  return true;
}

function refilter() {
  state.after = state.before = "";
  return load();
}

// ---- cards -----------------------------------------------------------------------------------

const imageUrl = (key, large = false) =>
  `/api/image/${encodeURIComponent(key)}?v=${summary?.version || ""}${large ? "&size=large" : ""}`;

function decision(pair) {
  if (pair.keep == null) return make("span", {}, pair.reason || "not decided");
  return make("span", { class: pair.keep ? "is-kept" : "is-dropped", title: summary?.reasons[pair.reason] },
    pair.keep ? "✓ kept" : `✗ ${pair.reason}`);
}

function textBlock(pair, focal) {
  const empty = !pair.caption?.trim();
  return make("div", { class: `text ${focal ? "focal" : "other"}` },
    make("div", { class: "meta" },
      make("span", { class: "source" }, pair.source),
      make("span", {}, `ITM ${score(pair.itm)}`), make("span", {}, `ITC ${score(pair.itc)}`),
      pair.similarity == null || !focal ? null : make("span", {}, `similarity ${score(pair.similarity)}`),
      decision(pair)),
    make("span", { class: `caption${empty ? " none" : ""}`, dir: "auto" }, empty ? "(no text)" : pair.caption));
}

function link(url) {
  let safe = false;
  try { safe = ["http:", "https:"].includes(new URL(url).protocol); } catch { /* shown as text */ }
  if (!safe) return make("span", { class: "plain-url" }, url);
  return make("a", { href: url, target: "_blank", rel: "noopener noreferrer" }, url);
}

function picture(pair, index) {
  const button = make("button", { type: "button", class: "picture", "aria-haspopup": "dialog",
    "aria-label": `All about ${pair.pair_id}`, onclick: () => { mark(index); details(pair); } });
  const lost = (why) => button.replaceChildren(make("span", {}, why));
  if (!pair.has_image) {
    lost(pair.error_message ? `no picture: ${pair.error_message}` : "no picture");
  } else {
    button.append(make("img", { src: imageUrl(pair.key), alt: `Picture ${pair.key}`, decoding: "async",
      onerror: () => lost("the picture can't be decoded") }));
  }
  return button;
}

function card(pair, index) {
  const buttons = summary?.read_only ? [] : VERDICTS.map(([verdict, name, key]) =>
    make("button", { type: "button", "data-verdict": verdict, "aria-keyshortcuts": key,
      "aria-pressed": String(pair.verdict === verdict),
      onclick: () => { mark(index); say(verdict, index); } }, name));
  const others = pair.others_said.map((each) => `${each.reviewer}: ${each.verdict}`).join(", ");
  return make("article", { class: "card", tabindex: "-1", "data-pair": pair.pair_id,
    "aria-label": `Pair ${pair.pair_id}, ${pair.source}, ${pair.keep ? "kept" : pair.reason || "not decided"}`,
    onfocusin: () => mark(index) },
    picture(pair, index),
    make("div", { class: "body" }, textBlock(pair, true), ...pair.texts.map((text) => textBlock(text, false)),
      pair.more_texts ? make("p", { class: "quiet" }, `and ${count(pair.more_texts)} more texts`) : null,
      pair.url ? make("div", { class: "meta url" }, link(pair.url)) : null),
    make("div", { class: "foot", role: "group", "aria-label": "Does the text fit the picture?" }, ...buttons,
      make("button", { type: "button", onclick: () => { mark(index); details(pair); } }, "Details"),
      make("span", { class: "quiet said" }, others)));
}

const cardAt = (index) => $("#grid").children[index]?.firstElementChild;

function mark(index, focus = false) {
  cardAt(current)?.classList.remove("current");
  current = Math.max(0, index);
  const element = cardAt(current);
  if (!element?.classList.contains("card")) return;
  element.classList.add("current");
  for (const each of $("#grid").querySelectorAll(".card")) each.tabIndex = each === element ? 0 : -1;
  if (focus) element.focus();
}

function move(step) {
  const next = current + step;
  if (next < 0) { if (!turn("previous", "last")) toast("This is the first pair."); return; }
  if (next >= (page?.pairs.length || 0)) { if (!turn("next", "first")) toast("This is the last pair."); return; }
  mark(next, true);
}

function columns() {
  const cells = [...$("#grid").children];
  const wraps = cells.findIndex((cell) => cell.offsetTop !== cells[0].offsetTop);
  return wraps < 1 ? cells.length || 1 : wraps;
}

// ---- verdicts --------------------------------------------------------------------------------

function showVerdict(pairId, verdict) {
  const index = page.pairs.findIndex((pair) => pair.pair_id === pairId);
  if (index < 0) return;
  page.pairs[index].verdict = verdict;
  for (const button of cardAt(index).querySelectorAll("[data-verdict]")) {
    button.setAttribute("aria-pressed", String(button.dataset.verdict === verdict));
  }
}

function say(verdict, index) {
  const pair = page?.pairs[index];
  if (!pair) return;
  if (summary.read_only) { toast("Read-only: nothing is stored."); return; }
  const before = pair.verdict;
  const body = JSON.stringify({ pair_id: pair.pair_id, verdict, sampling: page.sampling, reviewer: reviewer() });
  showVerdict(pair.pair_id, verdict);
  writes = writes.then(() => send("/api/labels", body)).then((answer) => {
    showLabels(answer.labels);
    toast(`Marked ${verdict}: ${pair.pair_id}`);
    tryThresholds();
  }).catch((error) => {
    showVerdict(pair.pair_id, before);
    toast(`Not stored: ${error.message}`);
  });
}

function undo() {
  if (summary.read_only) return;
  writes = writes.then(() => send("/api/labels", JSON.stringify({ undo: true, reviewer: reviewer() })))
    .then((answer) => {
      showLabels(answer.labels);
      if (!answer.undone) { toast("There is no verdict of yours to undo."); return; }
      showVerdict(answer.pair_id, answer.verdict);
      const index = page.pairs.findIndex((pair) => pair.pair_id === answer.pair_id);
      if (index >= 0) mark(index, true);
      toast(`Undone: ${answer.undone} on ${answer.pair_id}`);
      tryThresholds();
    }).catch((error) => toast(`Not undone: ${error.message}`));
}

function showLabels(labels) {
  summary.labels = labels;
  const mine = labels.reviewers[reviewer()];
  const total = mine ? VERDICTS.reduce((sum, [name]) => sum + mine[name], 0) : 0;
  const others = Object.keys(labels.reviewers).filter((name) => name !== reviewer()).length;
  $("#label-counts").textContent = `${count(total)} by me`
    + (mine ? ` (${mine.right} right, ${mine.wrong} wrong, ${mine.unsure} unsure)` : "")
    + `, ${pairs(labels.pairs)} reviewed` + (others ? `, ${others} other reviewer${others > 1 ? "s" : ""}` : "");
}

// ---- details ---------------------------------------------------------------------------------

function facts(rows) {
  return make("dl", { class: "facts" }, ...rows.filter(([, value]) => value != null && value !== "")
    .flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value instanceof Node ? value : String(value))]));
}

async function details(pair) {
  const mine = ++looked;
  $("#details-title").textContent = pair.pair_id;
  $("#details-body").replaceChildren(make("p", {}, "…"));
  if (!$("#details").open) $("#details").showModal();
  try {
    const query = reviewer() ? `?${new URLSearchParams({ reviewer: reviewer() })}` : "";
    const path = pair.pair_id.split("/").map(encodeURIComponent).join("/");
    const found = await ask(`/api/pair/${path}${query}`);
    if (mine !== looked) return;   // another pair's were asked for since
    const image = found.image || {};
    const size = (width, height) => (width == null ? null : `${width} × ${height} px`);
    $("#details-body").replaceChildren(
      found.has_image ? make("img", { src: imageUrl(found.key, true), alt: `Picture ${found.key}` }) : "",
      textBlock(found, true), ...found.texts.map((text) => textBlock(text, false)), likeThis(found),
      facts([["Url", image.url ? link(image.url) : null], ["Picture", found.key],
        ["Status", [image.status, image.error_message].filter(Boolean).join(": ")],
        ["Size", size(image.width, image.height)], ["As fetched", size(image.original_width, image.original_height)],
        ["sha256", image.sha256], ["uid", found.uid],
        ["Disagreement of ITC and ITM", found.disagreement == null ? null : score(found.disagreement)],
        ["Verdicts", found.labels.map((each) => `${each.reviewer}: ${each.verdict} (${each.time}, ${each.sampling})`).join("; ")]]),
      make("h3", {}, "Made by"),
      ...Object.entries(found.manifests).map(([table, record]) => make("div", {},
        facts([[table, `${record.stage}, ${record.finished}`], ["fingerprint", record.fingerprint]]),
        make("pre", { tabindex: "0" }, JSON.stringify({ config: record.config, weights: record.weights, versions: record.versions }, null, 1)))));
  } catch (error) {
    if (mine === looked) $("#details-body").replaceChildren(make("p", { role: "alert" }, error.message));
  }
}

function likeThis(pair) {
  if (!summary.search.available) return "";
  const choices = [["Pictures like this picture", pair.key, "image"], ["Texts for this picture", pair.key, "text"],
    ["Pictures for this text", pair.pair_id, "image"], ["Texts like this text", pair.pair_id, "text"]];
  return make("div", { class: "row" }, ...choices.map(([name, near, find]) =>
    make("button", { type: "button", onclick: () => { $("#details").close(); search({ near, find }); } }, name)));
}

// ---- thresholds ------------------------------------------------------------------------------

const scoreName = () => state.score || "itm";
let tries = 0;

// Synthetic texts have thresholds of their own where the URL or the run says so.
const ownThresholds = () => JSON.stringify(summary.thresholds.web) !== JSON.stringify(summary.thresholds.synthetic);
const parameter = (source, name) => (source === "synthetic" ? `t_synthetic_${name}` : `t_${name}`);

function tried(source, name) {
  const given = state[parameter(source, name)];
  if (given === "off") return null;
  if (given) return Number(given);
  return source === "synthetic" && !ownThresholds() ? tried("web", name) : summary.thresholds[source][name];
}

const together = () => ["itm", "itc"].every((name) => tried("web", name) === tried("synthetic", name));

function tryThreshold(source, name, value) {
  state[parameter(source, name)] = value == null ? "off" : value.toFixed(3);
}

// Synthetic texts get the web texts' threshold, by saying so only where that is needed.
function followWeb(name) {
  const limit = tried("web", name);
  delete state[parameter("synthetic", name)];
  if (limit !== tried("synthetic", name)) tryThreshold("synthetic", name, limit);
}

function showHistograms(histogram) {
  const name = scoreName();
  const { low, high, bins } = histogram;
  const blocks = Object.entries(histogram.sources).map(([source, numbers]) => {
    const top = Math.sqrt(Math.max(...numbers, 1));
    const total = numbers.reduce((sum, number) => sum + number, 0);
    const bars = numbers.map((number, bin) => {
      const height = number ? Math.max(1.5, (100 * Math.sqrt(number)) / top) : 0;
      return svg("rect", { x: bin + 0.08, y: 100 - height, width: 0.84, height, "data-low": low + (bin * (high - low)) / bins });
    });
    const plot = make("div", { class: "plot" },
      svg("svg", { viewBox: `0 0 ${bins} 100`, preserveAspectRatio: "none", role: "img",
        "aria-label": `${source}: histogram of ${count(total)} scores from ${low} to ${high}` }, ...bars));
    const range = source === "human" ? null : make("input", { type: "range", min: low, max: high, step: 0.005,
      "aria-label": `${name.toUpperCase()} threshold of ${source} texts`,
      oninput: (event) => drag(source, Number(event.target.value)),
      onchange: () => { storeState(); if (state.changes || state.order === "threshold") refilter(); } });
    if (range) plot.append(range);
    return make("div", { class: "histogram", "data-source": source },
      make("h3", {}, source, make("span", {}, source === "human" ? "kept whatever their score" : "")), plot,
      make("div", { class: "axis" }, make("span", {}, String(low)), make("span", {}, String((low + high) / 2)), make("span", {}, String(high))));
  });
  if (!blocks.length) blocks.push(make("p", { class: "quiet" }, "No pair has this score."));
  $("#histograms").replaceChildren(...blocks);
  paintThreshold();
}

function paintThreshold() {
  const name = scoreName();
  const low = name === "itm" ? 0 : -1;
  for (const block of document.querySelectorAll(".histogram")) {
    const { source } = block.dataset;
    const value = source === "human" ? null : tried(source, name);
    const range = $(".plot input", block);
    if (range) {
      range.value = value ?? low;
      range.setAttribute("aria-valuetext", value == null ? "off" : value.toFixed(3));
    }
    for (const bar of block.querySelectorAll(".plot rect")) {
      bar.classList.toggle("keeps", value == null || Number(bar.dataset.low) >= value - 1e-9);
    }
  }
}

function drag(source, value) {
  const name = scoreName();
  const limit = value <= (name === "itm" ? 0 : -1) ? null : value;
  if (!$("#together").checked) {
    if (source === "web") tryThreshold("synthetic", name, tried("synthetic", name));
    tryThreshold(source, name, limit);
  } else {
    tryThreshold("web", name, limit);
    followWeb(name);
  }
  paintThreshold();
  tryThresholds();
}

async function tryThresholds() {
  const mine = ++tries;
  await new Promise((done) => setTimeout(done, 40));   // the slider sends many a second
  if (mine !== tries) return;
  try {
    const answer = await ask(`/api/threshold?${parameters(TRIED)}`);
    if (mine === tries) showThresholds(answer);
  } catch (error) {
    if (mine === tries) $("#threshold-text").textContent = error.message;
  }
}

function ruleNames() {
  return Object.entries(summary.rules).map(([name, value]) => (name === "calibration"
    ? `calibration${value.target == null ? "" : ` for a precision of ${percent(value.target)}`}`
    : value === true ? name : `${name}: ${value}`)).join(", ");
}

function showThresholds({ thresholds: { web, synthetic }, as_run: asRun, all, sources }) {
  const said = (value) => (value == null ? "off" : Number(value).toFixed(3));
  const both = ({ itm, itc }) => `ITM ${said(itm)}, ITC ${said(itc)}`;
  const tells = both(web) === both(synthetic) ? both(web) : `web: ${both(web)}; synthetic: ${both(synthetic)}`;
  $("#threshold-line").textContent = asRun ? "as the run decided" : tells;
  $("#rules-text").hidden = !ruleNames();
  $("#rules-text").textContent = `The run was decided by ${ruleNames()}. `
    + "A threshold that is tried or saved here stands in its place.";
  $("#save button").disabled = asRun;
  $("#threshold-text").textContent = `Keeps ${count(all.would_keep)} of ${count(all.pairs)} pairs `
    + `(${percent(all.pairs ? all.would_keep / all.pairs : 0)}; the run keeps ${count(all.kept)}): `
    + `${count(all.joins)} join, ${count(all.leaves)} leave.`;
  const { random, any } = all.precision;
  $("#precision-text").textContent = random.labels
    ? `Precision of the kept ${random.sources.join(" and ")} texts, from ${count(random.labels)} random labels: ${percent(random.precision)} `
      + `(95 % interval ${percent(random.low)} to ${percent(random.high)}; ${count(random.unsure)} unsure left out).`
    : any.labels
      ? `Of ${count(any.labels)} labelled pairs that would be kept, ${percent(any.precision)} are right. They are no random `
        + "sample and say nothing of the others: review a random one for an estimate."
      : "Precision: no labels yet on pairs that would be kept. Review a random sample for an estimate.";
  if (all.other_matcher) {
    $("#precision-text").textContent += ` Left out are the labels on ${pairs(all.other_matcher)} that were given with another matcher.`;
  }
  for (const block of document.querySelectorAll(".histogram")) {
    const numbers = sources[block.dataset.source];
    if (!numbers) continue;
    const sampled = numbers.precision.random;
    $("h3 span", block).textContent = `keeps ${count(numbers.would_keep)} of ${count(numbers.pairs)}`
      + (sampled.labels ? `, ${percent(sampled.precision)} right (${percent(sampled.low)} to ${percent(sampled.high)})` : "");
  }
  $("#show-joins").disabled = !all.joins;
  $("#show-leaves").disabled = !all.leaves;
}

async function loadHistogram() {
  try {
    showHistograms(await ask(`/api/histogram?score=${scoreName()}`));
    tryThresholds();
  } catch (error) {
    $("#histograms").textContent = error.message;
  }
}

// ---- filters and search ----------------------------------------------------------------------

function showFilters() {
  const form = $("#filters");
  for (const name of FILTERS) {
    const field = form.elements[name];
    if (field.type === "checkbox") field.checked = state[name] === "1";
    else if (document.activeElement !== field) field.value = state[name] || (name === "order" ? startOrder() : "");
  }
  $("#seed-field").hidden = !RANDOM.includes(state.order);
  const used = FILTERS.filter((name) => state[name] && !["order", "desc", "seed"].includes(name)).length;
  $("#filter-count").hidden = !used;
  $("#filter-count").textContent = String(used);
  form.elements.order.querySelector("[value=similar]").hidden = !searching();
}

const searching = () => Boolean(state.near || state.near_text || state.near_upload);
const startOrder = () => (searching() ? "similar" : "pair");

function readFilters() {
  const form = $("#filters");
  for (const name of FILTERS) {
    const field = form.elements[name];
    state[name] = field.type === "checkbox" ? (field.checked ? "1" : "") : field.value.trim();
  }
  if (state.order === startOrder()) state.order = "";
  refilter();
}

function clearFilters(keep = []) {
  for (const name of FILTERS) if (!keep.includes(name)) state[name] = "";
}

function sample(mode) {
  clearFilters(["source"]);
  clearSearch();
  state.order = mode;
  state.review = "todo";
  if (RANDOM.includes(mode)) state.seed = state.seed || String(Math.floor(Math.random() * 1e6));
  refilter();
}

function clearSearch() {
  for (const name of SEARCH) state[name] = "";
  $("#near-picture").value = $("#near-text").value = $("#near").value = "";
}

function search(values) {
  for (const name of SEARCH) state[name] = values[name] || "";
  state.order = "";
  refilter();
}

function setUpSearch() {
  const { available, queries, why_not: why } = summary.search;
  for (const element of document.querySelectorAll(".needs-search")) element.hidden = !available;
  for (const element of document.querySelectorAll(".needs-matcher")) element.hidden = !available || !queries;
  $("#search-why").hidden = available && queries;
  $("#search-why").textContent = why || "The matcher is not loaded: search from a pair of the run, by its key or in its details.";
  $("#near-text").value = state.near_text || "";
  $("#near").value = state.near || "";
  $("#find").value = state.find || "image";
  $("#search-box").open = searching();
}

async function submitSearch() {
  const find = $("#find").value;
  const file = $("#near-picture").files[0];
  try {
    if (file) search({ ...(await send("/api/search/picture", file, file.type || "application/octet-stream")), find });
    else if ($("#near-text").value.trim()) search({ near_text: $("#near-text").value.trim(), find });
    else if ($("#near").value.trim()) search({ near: $("#near").value.trim(), find });
    else toast("Give a text, a picture or a key to search with.");
  } catch (error) {
    toast(error.message);
  }
}

// ---- events ----------------------------------------------------------------------------------

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const target = event.target;
  const typing = target.matches("input:not([type=checkbox], [type=radio], [type=range], [type=file]), select, textarea");
  if (typing) { if (event.key === "Escape") target.blur(); return; }
  const arrows = target.matches("input, summary");   // sliders and radios need their arrows
  const marks = { y: "right", n: "wrong", u: "unsure" };
  const actions = {
    j: () => move(1), k: () => move(-1), z: undo, "?": () => $("#help").showModal(),
    "/": () => { $("#filters-box").open = true; $("#filters").elements.words.focus(); },
  };
  // a key that is held down, or one that meant the slider, is no verdict
  if (!target.matches("[type=range]")) {
    for (const [key, verdict] of Object.entries(marks)) actions[key] = () => { say(verdict, current); move(1); };
  }
  if (!arrows) {
    actions.ArrowRight = actions.j;
    actions.ArrowLeft = actions.k;
    actions.ArrowDown = () => move(Math.min(columns(), Math.max(1, (page?.pairs.length || 1) - 1 - current)));
    actions.ArrowUp = () => move(-Math.min(columns(), Math.max(1, current)));
  }
  if (target.matches(".card")) actions.Enter = () => details(page.pairs[current]);
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const action = actions[key];
  if (!action || !page || !summary) return;
  event.preventDefault();
  if (event.repeat && (key in marks || key === "z")) return;
  action();
}

function listen() {
  let typed = 0;
  const form = $("#filters");
  form.addEventListener("submit", (event) => { event.preventDefault(); readFilters(); });
  form.addEventListener("input", (event) => {
    clearTimeout(typed);
    if (event.target.matches("select, [type=checkbox]")) readFilters();
    else typed = setTimeout(readFilters, 150);
  });
  $("#clear").addEventListener("click", () => { clearFilters(); for (const field of form.elements) field.blur?.(); refilter(); });
  for (const button of document.querySelectorAll("[data-sample]")) button.addEventListener("click", () => sample(button.dataset.sample));
  for (const button of document.querySelectorAll(".next")) button.addEventListener("click", () => turn("next"));
  for (const button of document.querySelectorAll(".previous")) button.addEventListener("click", () => turn("previous"));
  for (const radio of document.querySelectorAll("[name=score]")) {
    radio.addEventListener("change", () => { state.score = radio.value === "itm" ? "" : radio.value; storeState(); loadHistogram(); });
  }
  for (const side of ["joins", "leaves"]) {
    $(`#show-${side}`).addEventListener("click", () => { clearFilters(["source"]); state.changes = side; refilter(); });
  }
  $("#threshold-reset").addEventListener("click", () => {
    for (const name of TRIED) delete state[name];
    $("#together").checked = together();
    paintThreshold();
    tryThresholds();
    refilter();
  });
  $("#together").addEventListener("change", (event) => {
    if (!event.target.checked) return;   // from now on each slider moves its own
    ["itm", "itc"].forEach(followWeb);
    storeState();
    paintThreshold();
    tryThresholds();
    if (state.changes || state.order === "threshold") refilter();
  });
  $("#save").addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      const body = { name: $("#save-name").value };
      for (const name of TRIED) body[name] = state[name] || null;
      const answer = await send("/api/decision", JSON.stringify(body));
      $("#saved").hidden = false;
      $("#saved").textContent = `Saved ${answer.file} in the run folder. Apply it without a model:\n${answer.command}`;
      toast(`Saved ${answer.file}`);
    } catch (error) { toast(`Not saved: ${error.message}`); }
  });
  $("#search").addEventListener("submit", (event) => { event.preventDefault(); submitSearch(); });
  $("#search-clear").addEventListener("click", () => { clearSearch(); search({}); });
  $("#import").addEventListener("change", async (event) => {
    const file = event.target.files[0];
    if (!file) return;
    try {
      const answer = await send("/api/labels/import", file, "application/x-ndjson");
      showLabels(answer.labels);
      toast(`Imported ${count(answer.added)} labels; ${count(answer.present)} were there already.`);
      load();
      tryThresholds();
    } catch (error) { toast(`Not imported: ${error.message}`); }
    event.target.value = "";
  });
  $("#reviewer").addEventListener("change", () => { memory("capfilt-reviewer", reviewer()); showLabels(summary.labels); load(); });
  $("#help-button").addEventListener("click", () => $("#help").showModal());
  $("#details").addEventListener("close", () => cardAt(current)?.focus());
  addEventListener("keydown", onKey);
}

async function start() {
  if (matchMedia("(max-width: 760px)").matches) {
    for (const box of ["#filters-box", "#sampling-box", "#threshold-box"]) $(box).open = false;
  }
  $("#reviewer").value = memory("capfilt-reviewer") || "";
  for (const radio of document.querySelectorAll("[name=score]")) radio.checked = radio.value === scoreName();
  try {
    const first = ask(pageUrl({ after: state.after, before: state.before }));
    ahead = { url: pageUrl({ after: state.after, before: state.before }), promise: first };
    first.catch(() => {});
    const query = reviewer() ? `?${new URLSearchParams({ reviewer: reviewer() })}` : "";
    summary = await ask(`/api/summary${query}`);
  } catch (error) { problem(error.message); return; }
  const form = $("#filters");
  const reasons = [...new Set(summary.counts.map((row) => row.reason).filter(Boolean))].sort();
  form.elements.reason.append(...reasons.map((reason) => make("option", { value: reason, title: summary.reasons[reason] }, reason)));
  const sources = [...new Set(summary.counts.map((row) => row.source))].sort();
  form.elements.source.append(...sources.map((source) => make("option", { value: source }, source)));
  $("#shards").append(...summary.shard_names.map((shard) => make("option", { value: shard })));
  document.title = `${summary.run} · capfilt inspect`;
  $("#run-name").textContent = summary.run;
  $("#run-counts").textContent = `${pairs(summary.pairs)}, ${count(summary.pictures)} pictures, ${count(summary.shards)} ${summary.shards === 1 ? "shard" : "shards"}`;
  $("#read-only").hidden = !summary.read_only;
  if (summary.changed) $("#changed").hidden = false;
  for (const part of ["#reviewer-field", "#import-field", "#save"]) $(part).hidden = summary.read_only;
  if (!reviewer()) $("#reviewer").value = summary.reviewer;
  // the first page was asked for before the reviewer's name was known here
  if (ahead) ahead.url = pageUrl({ after: state.after, before: state.before });
  setUpSearch();
  showLabels(summary.labels);
  listen();
  await load();
  $("#together").checked = together();
  loadHistogram();
}

start();

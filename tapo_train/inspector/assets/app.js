// The pages of a run. Preact and htm (preact.js) make the elements; every text is a text node.
"use strict";
const { html, render, Component } = htmPreact;

// ---------------------------------------------------------------- data, loaded as scripts

const store = new Map(), waiting = new Map();
const KEY = /^(run|step_\d{6}(\/q_\d{4,})?)$/;
window.tapo = { put(key, value) { store.set(key, value); } };

function load(key) {
  if (store.has(key)) return Promise.resolve(store.get(key));
  if (!KEY.test(key)) return Promise.reject(new Error(`there is no page ${key}`));
  if (!waiting.has(key)) {
    waiting.set(key, new Promise((done, failed) => {
      const script = document.createElement("script");
      script.src = `data/${key}.js`;
      script.onload = () => store.has(key) ? done(store.get(key)) : failed(new Error(`${key} is damaged`));
      script.onerror = () => { waiting.delete(key); failed(new Error(`data/${key}.js is not there`)); };
      document.head.append(script);
    }));
  }
  return waiting.get(key);
}

// ---------------------------------------------------------------- numbers and words

const fixed = (value, digits = 2) => value === null || value === undefined || !Number.isFinite(value)
  ? "–" : value.toFixed(digits);
const signed = (value, digits = 3) => (value > 0 ? "+" : value < 0 ? "−" : "±") + fixed(Math.abs(value), digits);
const share = (part, whole) => whole ? `${part} of ${whole} (${Math.round(100 * part / whole)} %)` : "–";
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const json = value => JSON.stringify(value);
const link = (...parts) => "#/" + parts.map(encodeURIComponent).join("/");

function outcomeOf(attempt) {
  if (attempt.left_out) return "left out";
  return attempt.reward && attempt.reward.accuracy >= 0.5 ? "right" : "wrong";
}

const Badge = ({ kind, children }) => html`<span class="badge ${kind.replace(/[^a-z]/g, "-")}">${children}</span>`;

// ---------------------------------------------------------------- first page: the steps

function Steps({ run }) {
  const known = run.steps.length ? run.steps : [];
  const most = Math.max(1, ...known.map(step => step.reward || 0));
  return html`
    <h1>${run.name}</h1>
    <p class="note">${run.about}</p>
    ${run.notes.map(note => html`<p class="notice">${note}</p>`)}
    <div class="scroll" tabindex="0" role="region" aria-label="Steps"><table>
      <caption>Steps with dumped attempts, counted from 1 as on the console</caption>
      <thead><tr><th>step</th><th>questions</th><th>right</th><th>reward, mean ± spread</th>
        <th>failing attempts with a correction</th><th>tool steps corrected</th><th>cut at zero</th><th>left out</th></tr></thead>
      <tbody>${known.map(step => html`<tr>
        <td><a href=${link(step.file)}>step ${step.number}</a></td>
        <td>${step.questions}</td>
        <td>${share(step.right, step.attempts - step.left_out)}</td>
        <td><meter min="0" max=${most} value=${Math.max(0, step.reward || 0)} aria-hidden="true"></meter>
          ${fixed(step.reward)} ± ${fixed(step.spread)}</td>
        <td>${share(step.corrected_attempts, step.failing)}</td>
        <td>${step.corrected}</td><td>${step.cut}</td><td>${step.left_out}</td></tr>`)}
      </tbody></table></div>
    ${run.recipe && html`<details><summary>The recipe</summary><pre>${run.recipe}</pre></details>`}`;
}

// ---------------------------------------------------------------- a step: its questions, filtered

const FILTERS = [
  ["any", "all attempts", () => true],
  ["corrected", "corrected", a => a.corrected > 0],
  ["cut", "cut at zero", a => a.cut > 0],
  ["uncorrected", "failing, not corrected", a => !a.left_out && a.advantage < 0 && !a.corrected],
  ["failed", "with a failed call", a => a.failed > 0],
  ["right", "right answer", a => outcomeOf(a) === "right"],
  ["wrong", "wrong answer", a => outcomeOf(a) === "wrong"],
  ["left-out", "left out of the loss", a => a.left_out],
];

const AT_ONCE = 40;

class Questions extends Component {
  constructor() { super(); this.state = { show: "any", tool: "", turns: "", source: "", words: "", most: AT_ONCE }; }
  passes(question, attempt, words) {
    const { show, tool, turns, source } = this.state;
    if (!FILTERS.find(([name]) => name === show)[2](attempt)) return false;
    if (tool && !Object.hasOwn(attempt.tools, tool)) return false;
    if (turns && attempt.turns !== Number(turns)) return false;
    if (source && question.source !== source) return false;
    return !words || [question.question, question.group, attempt.answer || "", attempt.id]
      .some(text => text.toLowerCase().includes(words));
  }
  render({ run, step, file }) {
    const words = this.state.words.trim().toLowerCase();
    const distinct = pick => [...new Set(step.questions.flatMap(pick))].sort();
    const tools = distinct(q => q.attempts.flatMap(a => Object.keys(a.tools)));
    const turns = [...new Set(step.questions.flatMap(q => q.attempts.map(a => a.turns)))].sort((a, b) => a - b);
    const sources = distinct(q => [q.source]).filter(Boolean);
    const shown = step.questions
      .map(question => [question, question.attempts.map((a, n) => [a, n]).filter(([a]) => this.passes(question, a, words))])
      .filter(([, attempts]) => attempts.length);
    const count = shown.reduce((sum, [, attempts]) => sum + attempts.length, 0);
    const set = name => event => this.setState({ [name]: event.target.value, most: AT_ONCE });
    const choice = (name, label, options) => html`<label>${label}
      <select value=${this.state[name]} onChange=${set(name)}><option value="">all</option>
        ${options.map(option => html`<option value=${option}>${option}</option>`)}</select></label>`;
    return html`
      <h1>Step ${step.number}</h1>
      <form class="filters" onSubmit=${event => event.preventDefault()} aria-label="Filters">
        <label>show <select value=${this.state.show} onChange=${set("show")}>
          ${FILTERS.map(([name, label]) => html`<option value=${name}>${label}</option>`)}</select></label>
        ${choice("tool", "tool", tools)} ${choice("turns", "turns", turns)}
        ${sources.length > 1 && choice("source", "source", sources)}
        <label>search <input type="search" id="search" value=${this.state.words} onInput=${set("words")}
          placeholder="question, answer, id"/></label>
      </form>
      <p class="note" role="status">${plural(count, "attempt")} of ${plural(shown.length, "question")}</p>
      ${shown.slice(0, this.state.most).map(([question, attempts]) => html`<section class="question" key=${question.key}>
        <h2><a href=${link(file, question.key)}>${question.question || question.group}</a></h2>
        <p class="note">${question.group}${question.accepted.length ? ` · accepted: ${question.accepted.join(" | ")}` : ""}</p>
        <ul class="attempts">${attempts.map(([attempt, n]) => html`<li>
          <a href=${link(file, question.key, n)}>attempt ${n + 1}</a>
          <${Badge} kind=${outcomeOf(attempt)}>${outcomeOf(attempt)}<//>
          <span>${attempt.answer === null || attempt.answer === undefined ? "no answer" : attempt.answer}</span>
          <span class="number">advantage ${signed(attempt.advantage || 0)}</span>
          <span>${plural(attempt.turns, "turn")}</span>
          ${attempt.corrected > 0 && html`<${Badge} kind="corrected">${attempt.corrected} corrected<//>`}
          ${attempt.cut > 0 && html`<${Badge} kind="cut">${attempt.cut} cut at zero<//>`}
          ${attempt.failed > 0 && html`<${Badge} kind="failed">${plural(attempt.failed, "failed call")}<//>`}
        </li>`)}</ul></section>`)}
      ${shown.length > this.state.most && html`<p><button type="button" id="more"
        onClick=${() => this.setState({ most: this.state.most + AT_ONCE })}>show ${Math.min(AT_ONCE, shown.length - this.state.most)} more questions</button></p>`}`;
  }
}

// ---------------------------------------------------------------- pictures

// A picture and what was cut out of it: boxes are in [0, 1] of the picture's root.
function Picture({ image, images, boxes = [], label }) {
  const root = images.find(other => other.root === image.root && isWhole(other.box)) || image;
  const source = image.file ? image : root;
  if (!source.file) return html`<span class="missing">${label}: picture not dumped</span>`;
  const [x0, y0, x1, y1] = image.file ? [0, 0, 1, 1] : image.box;
  const width = source.width, height = source.height;
  const view = [x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height].join(" ");
  const inner = box => image.file ? within(image.box, box) : box;
  return html`<svg class="picture" viewBox=${view} role="img" aria-label=${label}>
    <image href=${"images/" + source.file} width=${width} height=${height}/>
    ${boxes.map(({ box, name }) => {
      const [a, b, c, d] = inner(box);
      return html`<rect class="cut-box" x=${a * width} y=${b * height} width=${(c - a) * width} height=${(d - b) * height}
        vector-effect="non-scaling-stroke"><title>${name}</title></rect>`;
    })}</svg>`;
}
const isWhole = box => box[0] === 0 && box[1] === 0 && box[2] === 1 && box[3] === 1;
function within([x0, y0, x1, y1], [a, b, c, d]) {
  return [(a - x0) / (x1 - x0), (b - y0) / (y1 - y0), (c - x0) / (x1 - x0), (d - y0) / (y1 - y0)];
}

// Crops of a picture that later turns made, to be drawn on it.
function cutsOf(image, attempt) {
  return attempt.images.map((other, n) => [other, n])
    .filter(([other]) => other !== image && other.root === image.root && !isWhole(other.box)
      && within(image.box, other.box).every(value => value >= -1e-6 && value <= 1 + 1e-6))
    .map(([other, n]) => ({ box: other.box, name: `picture ${n}` }));
}

// ---------------------------------------------------------------- tokens in colour

// Name: [label, value of a token, how it is shaded]. "both": two colours around zero, on the scale of
// the question's advantages or of its own; "one": one colour from zero up.
const known = value => value === null || value === undefined ? NaN : value;
const score = (turn, name, k) => turn.scores ? known(turn.scores[name][k]) : NaN;
const COLOURS = {
  none: ["no colour", null],
  after: ["advantage after", (turn, k) => advantageAt(turn, k), "advantage"],
  before: ["advantage before", (turn, k, attempt) => attempt.advantage, "advantage"],
  difference: ["difference made by credit", (turn, k, attempt) => advantageAt(turn, k) - attempt.advantage, "advantage"],
  surprise: ["sampler's −log p [nat]", (turn, k) => -known(turn.logprobs[k]), "one"],
  entropy: ["learner's entropy [nat]", (turn, k) => score(turn, "entropy", k), "one"],
  ratio: ["probability ratio − 1", (turn, k) => score(turn, "ratio", k) - 1, "both"],
  mismatch: ["log-probability, learner − sampler", (turn, k) => score(turn, "logprobs", k) - known(turn.logprobs[k]), "both"],
  version: ["version of the weights that sampled", (turn, k) => versionAt(turn, k), "one"],
};
function versionAt(turn, k) {
  const part = turn.versions.find(([start, end]) => start <= k && k < end);
  return part ? part[2] : NaN;
}
const versionsOf = turn => [...new Set(turn.versions.map(part => part[2]))];
function advantageAt(turn, k) {
  const own = turn.calls.find(call => call.advantage !== undefined && call.span
    && call.span[0] <= turn.start + k && turn.start + k < call.span[1]);
  return own ? own.advantage : turn.advantage;
}
// Ten steps either way, as classes: the policy of the page allows no styles on elements.
function shade(value, scale) {
  if (!Number.isFinite(value)) return "";
  if (scale.kind === "one") {
    const level = Math.round(10 * (value - scale.least) / (scale.most - scale.least));
    return level > 0 ? `low-${Math.min(10, level)}` : "";
  }
  const level = Math.min(10, Math.round(10 * Math.abs(value) / scale.most));
  return level ? (value > 0 ? `up-${level}` : `down-${level}`) : "";
}
const TINY = 1e-9;
// What the darkest shade stands for, over the attempts that are shown.
function scaleOf(colour, attempts) {
  const [, measure, kind] = COLOURS[colour];
  if (!measure) return null;
  if (kind === "advantage") return { kind, most: Math.max(TINY, ...attempts.map(a => Math.abs(a.advantage || 0))) };
  let most = TINY, least = Infinity;
  for (const attempt of attempts) for (const turn of attempt.turns) for (let k = 0; k < turn.logprobs.length; k++) {
    const value = measure(turn, k, attempt);
    if (Number.isFinite(value)) { most = Math.max(most, kind === "one" ? value : Math.abs(value)); least = Math.min(least, value); }
  }
  return { kind, most, least: colour === "version" ? Math.min(least, most - 1) : 0, empty: least === Infinity };
}
function Legend({ colour, scale }) {
  if (!scale) return null;
  const label = COLOURS[colour][0];
  if (scale.empty) return html`<p class="note" id="legend">${label}: not dumped for these attempts</p>`;
  if (colour === "version") return html`<p class="note" id="legend">${label}: darkest is ${scale.most}, the newest</p>`;
  if (scale.kind === "one") return html`<p class="note" id="legend">${label}: none is 0, <span class="low-10">darkest</span> is ${fixed(scale.most, 4)}</p>`;
  return html`<p class="note" id="legend">${label}: <span class="up-10">above</span> and <span class="down-10">below</span> 0, darkest is ${fixed(scale.most, 4)}</p>`;
}

function Written({ turn, attempt, colour, scale }) {
  if (!turn.text && !turn.pieces) return null;
  const measure = COLOURS[colour][1];
  if (!measure) return html`<pre class="written">${turn.text}</pre>`;
  if (!turn.pieces) {
    const value = measure(turn, 0, attempt);
    return html`<pre class="written ${scale.kind === "advantage" ? shade(value, scale) : ""}">${turn.text}</pre>`;
  }
  return html`<pre class="written">${turn.pieces.map((piece, k) => {
    const value = measure(turn, k, attempt);
    return html`<span class=${shade(value, scale)} title=${`${COLOURS[colour][0]} ${fixed(value, colour === "version" ? 0 : 4)}`}>${piece}</span>`;
  })}</pre>`;
}

// ---------------------------------------------------------------- why a step was corrected, or not

function Reason({ call, file, question, attempts }) {
  const cluster = call.cluster || [];
  return html`<div class="reason ${call.corrected ? "is-corrected" : ""}">
    <p><strong>${call.corrected ? "Corrected" : "Not corrected"}</strong>: ${call.why}.</p>
    ${call.similarity !== null && html`<dl>
      <div><dt>similarity</dt><dd>${fixed(call.similarity)} <small>(at least ${fixed(call.theta)})</small></dd></div>
      <div><dt>support</dt><dd>${fixed(call.support)}</dd></div>
      <div><dt>reference advantage</dt><dd>${signed(call.reference_advantage)}</dd></div>
      <div><dt>transfer</dt><dd>${fixed(call.transfer, 3)} <small>(times credit.beta is given to the turn)</small></dd></div></dl>`}
    ${cluster.length > 0 && html`<details><summary>${plural(cluster.length, "matching call")} of successful attempts</summary>
      <ul>${cluster.map(ref => {
        const held = (attempts[ref.attempt].turns.find(turn => turn.index === ref.turn) || { calls: [] }).calls[ref.call];
        return html`<li><a href=${link(file, question, ref.attempt)}>attempt ${ref.attempt + 1}, turn ${ref.turn + 1}</a>
          ${held && html`<code>${held.name}(${json(held.arguments)})</code>`}</li>`;
      })}</ul></details>`}</div>`;
}

function Call({ call, number, turn, attempt, context }) {
  const reason = turn.reason && turn.reason.calls[number];
  const made = (call.observation_images || [])
    .map(sha => attempt.images.findIndex(image => image.sha256 === sha)).filter(n => n >= 0);
  return html`<div class="call">
    <p><code class="name">${call.name || "unreadable"}</code> <code>${json(call.arguments)}</code>
      <${Badge} kind=${call.outcome || "none"}>${call.executed ? call.outcome : "not executed"}<//>
      ${Number.isFinite(call.latency_s) && html`<small>${fixed(call.latency_s, 2)} s</small>`}</p>
    ${call.observation !== null && call.observation !== undefined && html`<pre class="observation">${call.observation}</pre>`}
    ${made.length > 0 && html`<div class="pictures">${made.map(n => {
      const image = attempt.images[n], parent = !isWhole(image.box)
        && attempt.images.findIndex(other => other.root === image.root && isWhole(other.box));
      return html`${parent !== false && parent >= 0 && html`<figure>
          <${Picture} image=${attempt.images[parent]} images=${attempt.images} boxes=${[{ box: image.box, name: `picture ${n}` }]}
            label=${`picture ${parent} with the region that was cut`}/><figcaption>cut from picture ${parent}</figcaption></figure>`}
        <figure><${Picture} image=${image} images=${attempt.images} label=${`picture ${n}`}/><figcaption>picture ${n}</figcaption></figure>`;
    })}</div>`}
    ${reason && html`<${Reason} call=${reason} ...${context}/>`}</div>`;
}

function Turn({ turn, attempt, colour, scale, context }) {
  const before = attempt.advantage, after = turn.advantage;
  const moved = Number.isFinite(after) && Number.isFinite(before) && after !== before;
  return html`<article class="turn ${moved ? "is-corrected" : ""}" aria-label=${`turn ${turn.index + 1}`}>
    <header><h3>turn ${turn.index + 1}</h3>
      <span class="number">${moved ? html`advantage ${signed(before)} → <strong class="after">${signed(after)}</strong>` : html`advantage <span class="after">${signed(after === undefined || after === null ? before || 0 : after)}</span>`}</span>
      ${turn.reason && turn.reason.clipped && html`<${Badge} kind="cut">cut at zero<//>`}
      ${turn.versions.length > 0 && html`<small class="versions">weights ${versionsOf(turn).join(", then ")}</small>`}
      <${Mean} turn=${turn} attempt=${attempt} colour=${colour}/></header>
    <${Written} turn=${turn} attempt=${attempt} colour=${colour} scale=${scale}/>
    ${turn.calls.map((call, n) => html`<${Call} call=${call} number=${n} turn=${turn} attempt=${attempt} context=${context}/>`)}
  </article>`;
}

// The measure of a turn in one number, where its tokens differ in it.
function Mean({ turn, attempt, colour }) {
  const [label, measure, kind] = COLOURS[colour];
  if (!measure || kind === "advantage" || colour === "version") return null;
  const values = turn.logprobs.map((_, k) => measure(turn, k, attempt)).filter(Number.isFinite);
  if (!values.length) return html`<small>${label}: not known</small>`;
  return html`<small class="mean">${label}: mean ${fixed(values.reduce((a, b) => a + b) / values.length, 4)}</small>`;
}

function Attempt({ attempt, number, colour, scale, context, heading }) {
  const parts = attempt.reward ? Object.entries(attempt.reward.parts || {}) : [];
  return html`<section class="attempt">
    <h2>${heading ? html`<a href=${heading}>attempt ${number + 1}</a>` : `attempt ${number + 1}`}
      <${Badge} kind=${outcomeOf(attempt)}>${outcomeOf(attempt)}<//></h2>
    <p class="note">${attempt.id} · answer: ${attempt.answer === null || attempt.answer === undefined ? "none" : attempt.answer}${" "}· reward ${fixed(attempt.reward && attempt.reward.total)}${parts.length > 0 && ` (${parts.map(([name, value]) => `${name} ${fixed(value)}`).join(", ")})`}${" "}· advantage <span class="number">${signed(attempt.advantage || 0)}</span>${attempt.stop && ` · ended: ${attempt.stop}`}</p>
    ${attempt.turns.map(turn => html`<${Turn} turn=${turn} attempt=${attempt} colour=${colour} scale=${scale} context=${context}/>`)}
  </section>`;
}

// ---------------------------------------------------------------- a question: attempts side by side, or one

class Question extends Component {
  constructor() { super(); this.state = { colour: "after" }; }
  render({ data, file, question, number }) {
    const { attempts } = data, only = number === undefined ? null : attempts[number];
    const scale = scaleOf(this.state.colour, attempts);
    const context = { file, question, attempts };
    const first = attempts[0], pictures = first.images.slice(0, first.num_question_images);
    const at = only || first;
    return html`
      <h1>${data.question || data.group}</h1>
      <p class="note">${data.group}${data.accepted.length > 0 && ` · accepted: ${data.accepted.join(" | ")}`}</p>
      <div class="pictures">${pictures.map((image, n) => html`<figure>
        <${Picture} image=${image} images=${first.images} boxes=${cutsOf(at.images[n], at)} label=${`picture ${n} of the question, with the regions this attempt cut`}/>
        <figcaption>picture ${n}</figcaption></figure>`)}</div>
      ${data.prompt && html`<details><summary>The prompt</summary><pre>${data.prompt}</pre></details>`}
      <form class="filters" onSubmit=${event => event.preventDefault()} aria-label="Colour of the tokens">
        <label>colour tokens by <select id="colour" value=${this.state.colour} onChange=${event => this.setState({ colour: event.target.value })}>
          ${Object.entries(COLOURS).map(([name, [label]]) => html`<option value=${name}>${label}</option>`)}</select></label>
        ${only && html`<a href=${link(file, question)}>all attempts side by side</a>`}
        ${only && number > 0 && html`<a id="previous" href=${link(file, question, number - 1)}>previous attempt</a>`}
        ${only && number + 1 < attempts.length && html`<a id="next" href=${link(file, question, number + 1)}>next attempt</a>`}
      </form>
      <${Legend} colour=${this.state.colour} scale=${scale}/>
      <div class=${only ? "one" : "side-by-side"} tabindex=${only ? undefined : 0} role=${only ? undefined : "region"} aria-label=${only ? undefined : "Attempts"}>
        ${(only ? [[only, number]] : attempts.map((a, n) => [a, n])).map(([attempt, n]) => html`
          <${Attempt} key=${n} attempt=${attempt} number=${n} colour=${this.state.colour} scale=${scale} context=${context}
            heading=${only ? null : link(file, question, n)}/>`)}
      </div>`;
  }
}

// ---------------------------------------------------------------- the page around it

function route() {
  const parts = location.hash.replace(/^#\/?/, "").split("/").filter(Boolean).map(part => {
    try { return decodeURIComponent(part); } catch { return ""; }
  });
  return { file: parts[0], question: parts[1], number: parts[2] === undefined ? undefined : Number(parts[2]) };
}

class Page extends Component {
  constructor() { super(); this.state = { at: route(), run: null, step: null, data: null, error: null }; }
  componentDidMount() {
    addEventListener("hashchange", () => this.go());
    addEventListener("keydown", event => this.key(event));
    this.go();
  }
  async go() {
    const at = route();
    try {
      const run = await load("run");
      const step = at.file ? await load(at.file) : null;
      const data = at.question ? await load(`${at.file}/${at.question}`) : null;
      if (data && at.number !== undefined && !data.attempts[at.number]) throw new Error("there is no such attempt");
      this.setState({ at, run, step, data, error: null });
      document.title = [data && data.question, step && `step ${step.number}`, run.name].filter(Boolean).join(" · ");
      scrollTo(0, 0);
    } catch (error) {
      this.setState({ at, error: error.message });
    }
  }
  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    const follow = id => { const found = document.getElementById(id); if (found) found.click(); };
    if (event.key === "Escape") { typing ? event.target.blur() : history.back(); return; }
    if (typing) return;
    if (event.key === "/") { const box = document.getElementById("search"); if (box) { event.preventDefault(); box.focus(); } }
    if (event.key === "j") follow("next");
    if (event.key === "k") follow("previous");
  }
  render(_, { at, run, step, data, error }) {
    const crumbs = [run && html`<a href="#/">${run.name}</a>`,
      step && at.file && html`<a href=${link(at.file)}>step ${step.number}</a>`,
      data && at.question && html`<a href=${link(at.file, at.question)}>question</a>`,
      data && at.number !== undefined && html`<span aria-current="page">attempt ${at.number + 1}</span>`].filter(Boolean);
    const body = error ? html`<p class="notice" role="alert">${error}</p>`
      : !run ? html`<p class="note">Loading the run…</p>`
      : at.question && data ? html`<${Question} key=${at.file + at.question} data=${data} ...${at}/>`
      : at.file && step ? html`<${Questions} key=${at.file} run=${run} step=${step} file=${at.file}/>`
      : html`<${Steps} run=${run}/>`;
    return html`<nav aria-label="Where you are">${crumbs.map((crumb, n) => html`${n > 0 && " › "}${crumb}`)}
        <button type="button" id="theme" onClick=${turnTheme}>light / dark</button></nav>
      <main>${body}</main>
      <footer class="note">keys: <kbd>/</kbd> search · <kbd>j</kbd> <kbd>k</kbd> next and previous attempt · <kbd>Esc</kbd> back</footer>`;
  }
}

function turnTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
}

const page = document.getElementById("page");
page.replaceChildren();
render(html`<${Page}/>`, page);

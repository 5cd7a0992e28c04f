// The worker: it holds the WebAssembly of engine.c and does what the page asks, {id, name, args}.
// While a view plays, it trains in slices and sends frames, each after the page has drawn the last.
'use strict';
let wasm, drawn = true;
const utf8 = new TextEncoder(), words = new TextDecoder();
const floats = (at, n) => new Float32Array(wasm.memory.buffer, at, n);
const ints = (at, n) => new Int32Array(wasm.memory.buffer, at, n);
const copyFloats = (at, n) => floats(at, n).slice();

function sentence(at) {
  const bytes = new Uint8Array(wasm.memory.buffer, at);
  return words.decode(bytes.subarray(0, bytes.indexOf(0)));
}
function check(status) {
  if (status) throw new Error(sentence(wasm.web_said()));
}
function withTexts(list, body) { // body gets the addresses of zero-terminated copies, null: 0
  const at = list.map(text => {
    if (text == null) return 0;
    const bytes = utf8.encode(text.replace(/\0/g, ' ')), p = wasm.web_alloc(bytes.length + 1);
    const to = new Uint8Array(wasm.memory.buffer, p, bytes.length + 1);
    to.set(bytes), to[bytes.length] = 0;
    return p;
  });
  try { return body(...at); } finally { at.forEach(p => p && wasm.web_free(p)); }
}
async function unzip(base64) {
  const bytes = Uint8Array.from(atob(base64), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// ---- the plane ----
const POINTS = 400, WIDTH = 6;
const plane = {playing: false, experts: 4, test: null};

function planeMap(task, side, expert) {
  check(wasm.plane_map(task, side, expert));
  const n = side * side;
  return {side, expert: ints(wasm.plane_array(2), n).slice(),
          weight: copyFloats(wasm.plane_array(3), n), score: copyFloats(wasm.plane_array(4), n)};
}
function planeAccuracy(task) {
  const {points, labels} = plane.test, n = labels[task].length, at = wasm.web_alloc(12 * n);
  floats(at, 2 * n).set(points), floats(at + 8 * n, n).set(labels[task]);
  const share = wasm.plane_accuracy(task, at, at + 8 * n, n);
  wasm.web_free(at);
  return share;
}
function planeFrame() {
  const tasks = wasm.plane_tasks(), maps = [], accuracy = [], experts = [];
  for (let t = 0; t < tasks; ++t) maps.push(planeMap(t, 32, -1)), accuracy.push(planeAccuracy(t));
  const of = Math.min(plane.shown, tasks - 1);
  for (let e = 0; e < plane.experts; ++e) experts.push(planeMap(of, 16, e).score);
  return {steps: wasm.plane_steps_done(), loss: wasm.plane_loss(), tasks, maps, accuracy, experts,
          rate: plane.rate, parameters: wasm.plane_parameters()};
}

// ---- the text ----
const text = {playing: false, names: []};

function textAsk(question) { // "a | b" is a pair
  const [first, ...rest] = question.split('|'), second = rest.join('|').trim();
  withTexts([first, second || null], (a, b) => check(wasm.text_ask(a, b)));
  const n = wasm.text_pieces(0), T = text.names.length, stride = wasm.text_stride();
  const {layers: L, experts: N} = text;
  return {pair: !!second, pieces: wasm.text_pieces(1), ids: ints(wasm.text_array(1), n).slice(),
          scores: copyFloats(wasm.text_array(2), T * stride), stride, layers: L, experts: N,
          expert: ints(wasm.text_array(3), L * T * n).slice(),
          prob: copyFloats(wasm.text_array(4), L * T * n * N), step: wasm.text_steps_done()};
}
function textFrame(whole, rows = 100) { // on that many dev rows; 0: all
  const frame = {step: wasm.text_steps_done(), loss: wasm.text_loss(), whole,
                 seconds: text.seconds};
  if (whole) {
    frame.dev = text.names.map((name, t) => (check(wasm.text_dev(t, rows)), wasm.text_metric(t)));
    if (text.question) frame.ask = textAsk(text.question);
  }
  return frame;
}

const methods = {
  async begin(engine) {
    const made = await WebAssembly.instantiate(await unzip(engine), {});
    wasm = made.instance.exports;
    wasm.web_begin();
    return sentence(wasm.web_isa());
  },
  planeData(points, labels, test) { // labels: one array for each task, -1: not a point of it
    floats(wasm.plane_array(0), 2 * POINTS).set(points);
    labels.forEach((of, t) => floats(wasm.plane_array(1) + 4 * t * POINTS, POINTS).set(of));
    plane.test = test;
  },
  planeReset(o) {
    plane.playing = false;
    plane.experts = o.router ? o.experts : 1;
    plane.shown = plane.rate = 0;
    check(wasm.plane_reset(o.router, o.experts, o.topK, o.scaleN, o.rate, o.seed, o.tasks));
    return planeFrame();
  },
  planeAdapt(from) { check(wasm.plane_adapt(from)); return planeFrame(); },
  planeRate(rate) { wasm.plane_set_rate(rate); },
  planeShow(task) { plane.shown = task; return planeFrame(); },
  planeSteps(n) { check(wasm.plane_steps(n)); return planeFrame(); },
  planeProbe(task, x, y) {
    check(wasm.plane_probe(task, x, y));
    const f = copyFloats(wasm.plane_array(5), WIDTH + 48 + 32 * WIDTH + WIDTH + 2);
    let at = 0;
    const take = n => Array.from(f.subarray(at, at += n)), N = plane.experts;
    const rows = () => { const all = take(16 * WIDTH); return [...Array(N)].map((_, i) =>
      all.slice(i * WIDTH, (i + 1) * WIDTH)); };
    const cut = () => take(16).slice(0, N);
    return {input: take(WIDTH), logit: cut(), prob: cut(), weight: cut(), output: rows(),
            gate: rows(), hidden: take(WIDTH), score: take(2)};
  },
  planeWeights() { return copyFloats(wasm.plane_weights(), wasm.plane_parameters()); },
  planePlay(on) { plane.playing = on; if (on) slices(); },

  async textData(packed) {
    const lines = words.decode(await unzip(packed)).split('\n'), files = {};
    for (let i = 0; i < lines.length && lines[i].startsWith('FILE '); ) {
      const [, name, n] = lines[i].split(' ');
      files[name] = lines.slice(i + 1, i += 1 + +n);
    }
    text.files = files;
    const [head, ...rows] = files['tasks.tsv'].map(line => line.split('\t'));
    text.tasks = rows.map(row => Object.fromEntries(row.map((field, i) => [head[i], field])));
    for (const task of text.tasks) {
      task.range = task.labels.split('..');
      task.classes = task.range[1] ? null :
        task.labels.split(',').map(label => label.slice(label.indexOf('=') + 1));
      task.rows = {train: files[task.name + '/train.tsv'].length - 1,
                   dev: files[task.name + '/dev.tsv'].length - 1};
    }
    return {tasks: text.tasks, vocab: files['vocab.txt']};
  },
  textStart(o) { // {tasks: names, router, experts, layers, hidden, ffn, rate, steps, seed}
    text.playing = false;
    Object.assign(text, {names: o.tasks, layers: o.layers, seconds: 0, steps: o.steps,
                         experts: o.router ? o.experts : 1, every: o.every});
    const vocab = text.files['vocab.txt'].join('\n') + '\n';
    withTexts([vocab], at => check(wasm.text_open(at, utf8.encode(vocab).length)));
    o.tasks.forEach((name, t) => {
      const task = text.tasks.find(each => each.name === name), pair = +(task.input === 'pair');
      withTexts([name, task.classes && task.classes.join('\n')], (a, b) =>
        check(wasm.text_add_task(a, b, pair, +task.range[0] || 0, +task.range[1] || 0,
                                 +task.max_len || 0)));
      ['train', 'dev'].forEach((file, set) => {
        const [head, ...rows] = text.files[`${name}/${file}.tsv`].map(line => line.split('\t'));
        const [label, one, two] = ['label', 'sentence1', 'sentence2'].map(c => head.indexOf(c));
        for (const row of rows)
          withTexts([row[one], pair ? row[two] : null], (a, b) =>
            check(wasm.text_add_row(t, set, +row[label], a, b)));
      });
    });
    check(wasm.text_start(o.router, o.experts, o.layers, o.hidden, o.ffn, o.rate, o.steps, o.seed));
    return {...textFrame(true), parameters: wasm.text_parameters()};
  },
  textQuestion(question) { text.question = question; return textAsk(question); },
  textSteps(n) { while (n-- > 0) check(wasm.text_step()); return textFrame(true); },
  textScores(t) { // of the dev rows, as `./train --predictions` writes them
    check(wasm.text_dev(t, 0));
    const rows = text.tasks.find(each => each.name === text.names[t]).rows.dev;
    return {stride: wasm.text_stride(), scores: copyFloats(wasm.text_array(0),
                                                           rows * wasm.text_stride())};
  },
  textPlay(on) { text.playing = on; if (on) slices(); },
};

let slicing = false;
const channel = new MessageChannel(); // comes back after messages of the page, without waiting
const pause = () => new Promise(done => { channel.port1.onmessage = done;
                                          channel.port2.postMessage(0); });
async function slices() {
  if (slicing) return;
  slicing = true;
  let at = performance.now(), steps = 0;
  try {
    while (plane.playing || text.playing) {
      const began = performance.now();
      if (plane.playing) {
        do check(wasm.plane_steps(1)), ++steps; while (performance.now() - began < 30);
        if (drawn && began - at > 200) {
          plane.rate = steps * 1000 / (performance.now() - at);
          drawn = false, postMessage({plane: planeFrame()});
          at = performance.now(), steps = 0;
        }
      }
      if (text.playing) {
        const now = performance.now();
        check(wasm.text_step());
        text.seconds += (performance.now() - now) / 1000;
        const step = wasm.text_steps_done(), end = step >= text.steps;
        text.playing = text.playing && !end;
        postMessage({text: {...textFrame(end || step % text.every === 0, end ? 0 : 100), end}});
      }
      await pause();
    }
  } catch (e) {
    plane.playing = text.playing = false;
    postMessage({stopped: e.message});
  }
  slicing = false;
}

onmessage = async ({data}) => {
  if (data.drawn) { drawn = true; return; }
  try {
    postMessage({id: data.id, result: await methods[data.name](...data.args)});
  } catch (e) {
    postMessage({id: data.id, error: e.message});
  }
};

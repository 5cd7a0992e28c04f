// The plane: points, rules that label them, maps of experts and boundaries, the equations.
const POINTS = 400, TRAIN = 160, SIDE = 256;
const rules = {
  circle: ['inside a circle', (x, y) => x * x + y * y < 0.45],
  shifted: ['inside a shifted circle', (x, y) => (x - 0.2) ** 2 + (y + 0.15) ** 2 < 0.4],
  corners: ['corners (x y above 0)', (x, y) => x * y > 0],
  turned: ['corners, turned', (x, y) => (0.95 * x - 0.3 * y) * (0.3 * x + 0.95 * y) > 0],
  above: ['above a line', (x, y) => y > 0.4 * x],
  stripes: ['stripes', (x, y) => Math.sin(4 * (x + y)) > 0],
};
const planeState = {data: null, frame: null, history: [], playing: false, at: [0, 0.3, 0.4]};
const planeEngine = startEngine(({plane}) => plane && showPlane(plane));

function uniform(seed) { // mulberry32: the same points everywhere
  return () => {
    seed = seed + 0x6d2b79f5 | 0;
    let t = Math.imul(seed ^ seed >>> 15, 1 | seed);
    t = t + Math.imul(t ^ t >>> 7, 61 | t) ^ t;
    return ((t ^ t >>> 14) >>> 0) / 2 ** 32;
  };
}

function planeOptions() {
  const form = new FormData($('plane-options')), of = name => +form.get(name);
  const names = ['A', 'B', 'C'].map(task => form.get(task));
  return {router: of('router'), experts: of('experts'), topK: of('topK'), scaleN: of('scaleN'),
          rate: of('rate'), noise: of('noise'), seed: of('seed'), names,
          tasks: form.get('C').endsWith('all') ? 3 : 2};
}

// Points of training (task C: all, or five) and a grid that tests what was learned.
function planeData(o) {
  const random = uniform(7), points = new Float32Array(2 * POINTS).map(() => 2 * random() - 1);
  const flip = uniform(11), labels = [], test = {points: new Float32Array(2 * 900), labels: []};
  for (let i = 0; i < 900; ++i)
    test.points.set([(i % 30 + 0.5) / 15 - 1, (Math.floor(i / 30) + 0.5) / 15 - 1], 2 * i);
  o.names.forEach((name, t) => {
    const rule = rules[name.split(' ')[0]][1], some = t === 2 && o.tasks < 3 ? 5 : TRAIN;
    const of = new Float32Array(POINTS).fill(-1);
    const take = some === 5 ? [3, 28, 51, 74, 97] : [...Array(some).keys()];
    for (const i of take) {
      const right = rule(points[2 * i], points[2 * i + 1]);
      of[i] = +(some > 5 && flip() < o.noise ? !right : right);
    }
    labels.push(of);
    test.labels.push(Float32Array.from({length: 900}, (_, i) =>
      +rule(test.points[2 * i], test.points[2 * i + 1])));
  });
  return {points, labels, test};
}

async function resetPlane() {
  const o = planeOptions();
  playPlane(false);
  trouble();
  planeState.options = o, planeState.history = [];
  planeState.data = planeData(o);
  await planeEngine.ask('planeData', planeState.data.points, planeState.data.labels,
                        planeState.data.test);
  showPlane(await planeEngine.ask('planeReset', o));
}

function playPlane(on) {
  planeState.playing = on;
  $('plane-play').textContent = on ? 'Pause' : 'Play';
  planeEngine.ask('planePlay', on);
}

function makeFigures(where, n, caption, small) {
  while (where.children.length > n) where.lastChild.remove();
  while (where.children.length < n) {
    const figure = document.createElement('figure'), canvas = document.createElement('canvas');
    figure.append(document.createElement('figcaption'), canvas);
    where.append(figure);
    if (!small) pointing(canvas, where.children.length - 1);
  }
  [...where.children].forEach((figure, i) => {
    figure.firstChild.innerHTML = caption(i);
    figure.lastChild.setAttribute('aria-label', figure.firstChild.textContent);
    figure.lastChild.setAttribute('role', 'img');
  });
}

// Pointing at the plane, with a mouse, a finger or the arrow keys.
function pointing(canvas, task) {
  canvas.tabIndex = 0;
  const move = (x, y) => { planeState.at = [task, x, y]; probePlane(); };
  canvas.onpointermove = canvas.onpointerdown = e => {
    const box = canvas.getBoundingClientRect();
    move(2 * (e.clientX - box.left) / box.width - 1, 1 - 2 * (e.clientY - box.top) / box.height);
  };
  canvas.onclick = async () => showPlane(await planeEngine.ask('planeShow', task));
  canvas.onkeydown = e => {
    const step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1]}[e.key];
    if (e.key === 'Enter') canvas.onclick();
    if (!step) return;
    e.preventDefault();
    const clip = v => Math.max(-1, Math.min(1, v)), [, x, y] = planeState.at;
    move(clip(x + step[0] / 16), clip(y + step[1] / 16));
  };
}

// The line where the score changes its sign, cell by cell of the map.
function boundary(to, score, side, size) {
  const at = (i, j) => score[j * side + i], cell = size / side;
  to.beginPath();
  for (let j = 0; j + 1 < side; ++j)
    for (let i = 0; i + 1 < side; ++i) {
      const corner = [[i, j], [i + 1, j], [i + 1, j + 1], [i, j + 1]], ends = [];
      for (let e = 0; e < 4; ++e) {
        const [a, b] = [corner[e], corner[(e + 1) % 4]], u = at(...a), v = at(...b);
        if (u > 0 === v > 0) continue;
        const part = u / (u - v);
        ends.push([(a[0] + 0.5 + part * (b[0] - a[0])) * cell,
                   (a[1] + 0.5 + part * (b[1] - a[1])) * cell]);
      }
      for (let e = 0; e + 1 < ends.length; e += 2) to.moveTo(...ends[e]), to.lineTo(...ends[e + 1]);
    }
  to.stroke();
}

function paint(canvas, side, color) { // color(i): [r, g, b, a from 0 to 1]
  canvas.width = canvas.height = SIDE;
  const to = canvas.getContext('2d'), small = new OffscreenCanvas(side, side);
  const image = new ImageData(side, side);
  for (let i = 0; i < side * side; ++i) {
    const [r, g, b, a] = color(i);
    image.data.set([r, g, b, 255 * a], 4 * i);
  }
  small.getContext('2d').putImageData(image, 0, 0);
  to.imageSmoothingEnabled = false;
  to.drawImage(small, 0, 0, SIDE, SIDE);
  return to;
}
const rgb = experts.map(hex => [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16)));

function drawTask(canvas, t) {
  const {frame, data, options} = planeState, {side, expert, weight, score} = frame.maps[t];
  const n = options.router ? options.experts : 1, ink = css('--ink'), paper = css('--page');
  const to = paint(canvas, side, i => [...rgb[expert[i]],
    n > 1 ? 0.2 + 0.75 * Math.max(0, (weight[i] - 1 / n) / (1 - 1 / n)) : 0.35]);
  to.strokeStyle = ink, to.lineWidth = 2.5;
  boundary(to, score, side, SIDE);
  for (let i = 0; i < POINTS; ++i) { // full: class 1, hollow: class 0
    const label = data.labels[t][i];
    if (label < 0) continue;
    to.beginPath();
    to.arc((data.points[2 * i] + 1) / 2 * SIDE, (1 - data.points[2 * i + 1]) / 2 * SIDE,
           t === 2 && options.tasks < 3 ? 6 : 3, 0, 7);
    to.fillStyle = label ? ink : paper, to.strokeStyle = ink, to.lineWidth = 1;
    to.fill(), to.stroke();
  }
  to.font = 'bold 15px system-ui, sans-serif', to.textAlign = 'center', to.lineWidth = 4;
  for (let e = 0; e < n && n > 1; ++e) { // its number, in the middle of what it takes
    let count = 0, x = 0, y = 0;
    expert.forEach((of, i) => { if (of === e) ++count, x += i % side, y += Math.floor(i / side); });
    if (count < side) continue;
    x = x / count, y = y / count;
    let best = -1, least = Infinity;
    expert.forEach((of, i) => {
      const far = (i % side - x) ** 2 + (Math.floor(i / side) - y) ** 2;
      if (of === e && far < least) least = far, best = i;
    });
    const [px, py] = [(best % side + 0.5) / side * SIDE, (Math.floor(best / side) + 0.5) / side * SIDE];
    to.strokeStyle = paper, to.fillStyle = ink;
    to.strokeText(e + 1, px, py + 5), to.fillText(e + 1, px, py + 5);
  }
  const [task, x, y] = planeState.at;
  if (task !== t) return;
  to.strokeStyle = ink, to.lineWidth = 1.5;
  const [px, py] = [(x + 1) / 2 * SIDE, (1 - y) / 2 * SIDE];
  to.beginPath(), to.arc(px, py, 7, 0, 7), to.moveTo(px - 12, py), to.lineTo(px + 12, py);
  to.moveTo(px, py - 12), to.lineTo(px, py + 12), to.stroke();
}

function drawPlane() {
  const {frame, options} = planeState;
  if (!frame || !planeState.history.length || $('plane').hidden) return; // none after a reset
  const rule = t => rules[options.names[t].split(' ')[0]][0];
  const shown = Math.min(planeState.at[0], frame.tasks - 1), n = frame.experts.length;
  makeFigures($('maps'), frame.tasks, t => `<b>Task ${'ABC'[t]}</b>: ${rule(t)}, ${
    fixed(100 * frame.accuracy[t], 1)} % right`);
  [...$('maps').children].forEach((figure, t) => {
    figure.className = t === shown ? 'shown' : '';
    drawTask(figure.lastChild, t);
  });
  $('experts-title').textContent = n > 1 ? `What each expert would answer for task ${
    'ABC'[shown]}, if every point went to it` : 'What the only network answers';
  makeFigures($('experts'), n, e => `${swatch(e)}expert ${e + 1}`, true);
  [...$('experts').children].forEach((figure, e) => {
    const score = frame.experts[e], to = paint(figure.lastChild, 16, i =>
      [...rgb[e], Math.min(0.95, 0.08 + 0.87 / (1 + Math.exp(-score[i])))]);
    to.strokeStyle = css('--ink'), to.lineWidth = 5;
    boundary(to, score, 16, SIDE);
  });
  const series = [{name: 'loss', color: css('--soft'), dashed: true,
                   points: planeState.history.filter(h => h.steps)
                     .map(h => [h.steps, Math.min(2, h.loss)])}];
  for (let t = 0; t < frame.tasks; ++t)
    series.push({name: `right ${'ABC'[t]}`, color: curves[t], points: planeState.history
      .filter(h => t < h.accuracy.length).map(h => [h.steps, h.accuracy[t]])});
  drawChart($('plane-chart'), series, planeState.history.at(-1).steps, 'Loss and accuracy');
}

function showPlane(frame) {
  planeState.frame = frame;
  const joined = planeState.joined || 0; // steps before task C joined
  planeState.history.push({steps: joined + frame.steps, loss: frame.loss, accuracy: frame.accuracy});
  $('plane-state').textContent = `step ${joined + frame.steps}${
    frame.steps ? `, loss ${fixed(frame.loss, 3)}` : ''}${
    frame.rate ? `, ${Math.round(frame.rate)} steps/s` : ''}, ${frame.parameters} parameters`;
  $('third').hidden = frame.tasks > 2;
  drawPlane();
  probePlane();
}
onshow.plane = drawPlane;

let probing = false, again = false;
async function probePlane() {
  if (probing) { again = true; return; }
  probing = true;
  do {
    again = false;
    const t = Math.min(planeState.at[0], planeState.frame.tasks - 1), [, x, y] = planeState.at;
    const p = await planeEngine.ask('planeProbe', t, x, y).catch(() => null);
    if (p) showNumbers(t, x, y, p);
  } while (again);
  probing = false;
}

function showNumbers(t, x, y, p) {
  const {options} = planeState, dense = !options.router;
  const chosen = p.weight.map((w, i) => [w, i]).filter(([w]) => w > 0).sort((a, b) => b[0] - a[0])
    .map(([, i]) => i);
  const task = 'ABC'[t], best = chosen[0] || 0, gate = options.router === 1 ? 'W_g' : `W_g,${task}`;
  const prob = 1 / (1 + Math.exp(p.score[0] - p.score[1]));
  const lines = [`<p><b>Point (${fixed(x)}, ${fixed(y)}), task ${task}</b>: class ${
    +(prob > 0.5)}, probability ${fixed(Math.max(prob, 1 - prob))}</p>`,
    `<p><span class=eq>input</span> <code>x = ${vector(p.input)}</code></p>`];
  if (dense) lines.push('<p><span class=eq>Eq. 2</span> one network, no gate: g* = 1</p>');
  else {
    lines.push(`<p><span class=eq>Eq. 3</span> <code>${gate} x: row ${best + 1} ${
      vector(p.gate[best])} &middot; x = <b>${fixed(p.logit[best])}</b></code><br>all: ${
      p.logit.map((z, i) => `${swatch(i)}${fixed(z)}`).join(' ')}</p>`);
    lines.push(...gateLines(p.logit, p.prob, chosen));
  }
  lines.push(`<p><span class=eq>Eq. 1</span> <code>E<sub>${best + 1}</sub>(x) = ${
    vector(p.output[best])}</code></p>`);
  lines.push(`<p><span class=eq>Eq. 6</span> <code>h = ${chosen.map(i =>
    `${fixed(p.weight[i], 3)} E<sub>${i + 1}</sub>(x)`).join(' + ') || 'E(x)'}</code>${
    !dense && options.scaleN ? `, the weight is g* N/k` : ''}</p>`);
  lines.push(`<p><span class=eq>Eq. 7</span> <code>scores ${vector(p.score)}: softmax = ${
    fixed(1 - prob, 3)}, ${fixed(prob, 3)}</code></p>`);
  $('numbers').innerHTML = lines.join('');
  if (!$('plane').hidden) [...$('maps').children].forEach((figure, i) => drawTask(figure.lastChild, i));
}

async function compareSystems() {
  const names = ['dense', 'shared gate', 'task gates'], rows = [];
  playPlane(false);
  $('compare').disabled = true;
  for (let router = 0; router < 3; ++router) {
    $('plane-options').elements.router.value = router;
    planeState.joined = 0;
    await resetPlane();
    for (let i = 0; i < 12; ++i) showPlane(await planeEngine.ask('planeSteps', 50));
    rows.push([names[router], planeState.frame.parameters, ...planeState.frame.accuracy]);
  }
  const heads = ['system', 'parameters', ...['A', 'B', 'C'].slice(0, planeState.frame.tasks)];
  const table = $('compared'), caption = table.caption;
  table.innerHTML = `<tr>${heads.map(h => `<th scope=col>${h}</th>`).join('')}</tr>${rows.map(row =>
    `<tr><th scope=row>${row[0]}</th><td>${row[1]}</td>${row.slice(2).map(a =>
      `<td>${fixed(100 * a, 1)} %</td>`).join('')}</tr>`).join('')}`;
  table.prepend(caption);
  table.hidden = false;
  $('compare').disabled = false;
}

function setUpPlane() {
  const form = $('plane-options'), fill = (name, list, chosen) => {
    form.elements[name].innerHTML = list.map(([value, words]) =>
      `<option value="${value}"${value === chosen ? ' selected' : ''}>${words}`).join('');
  };
  const all = Object.entries(rules).map(([name, [words]]) => [name, words]);
  fill('A', all, 'circle');
  fill('B', all, 'corners');
  fill('C', [...all.map(([name, words]) => [`${name} five`, `${words}, five points`]),
             ...all.map(([name, words]) => [`${name} all`, `${words}, from the start`])],
       'shifted five');
  form.onchange = async e => {
    if (e.target.name === 'rate') {
      await planeEngine.ask('planeRate', +e.target.value);
      return;
    }
    $('compared').hidden = true;
    planeState.joined = 0;
    resetPlane();
  };
  form.onsubmit = e => e.preventDefault();
  $('plane-play').onclick = () => playPlane(!planeState.playing);
  $('plane-step').onclick = async () => {
    playPlane(false);
    showPlane(await planeEngine.ask('planeSteps', 1));
  };
  $('plane-reset').onclick = () => { planeState.joined = 0; resetPlane(); };
  $('compare').onclick = compareSystems;
  $('adapt').onclick = async () => {
    const gates = planeState.options.router === 2, from = +$('gate-from').value;
    const before = (planeState.joined || 0) + planeState.frame.steps;
    playPlane(false);
    planeState.at[0] = 2;
    const frame = await planeEngine.ask('planeAdapt', gates ? from : -1);
    planeState.joined = before;
    showPlane(await planeEngine.ask('planeShow', 2) || frame);
  };
  return planeEngine.ready.then(resetPlane);
}

// The text: the bundled tasks train, a sentence shows which expert takes each of its tokens.
const textState = {tasks: [], curve: [], snaps: [], layer: 0, playing: false, started: false};
const textEngine = startEngine(({text}) => text && showText(text));
const model = {layers: 2, hidden: 32, ffn: 64, rate: 0.002, seed: 1, every: 20};

function textOptions() {
  const form = new FormData($('text-options'));
  return {...model, tasks: form.getAll('task'), router: +form.get('router'),
          experts: +form.get('experts'), steps: +form.get('steps')};
}

async function resetText() {
  const o = textOptions();
  if (!o.tasks.length) { trouble('Choose a task at least.'); return; }
  playText(false);
  trouble();
  $('text-state').textContent = 'reading the rows ...';
  Object.assign(textState, {options: o, curve: [], snaps: [], dev: [], ended: false});
  const frame = await textEngine.ask('textStart', o);
  textState.parameters = frame.parameters;
  showText(frame);
  await askText();
}

function playText(on) {
  if (on && textState.ended) { resetText().then(() => playText(true)); return; }
  textState.playing = on;
  $('text-play').textContent = on ? 'Pause' : 'Play';
  textEngine.ask('textPlay', on);
}

async function askText() {
  if (!textState.options) return;
  const ask = await textEngine.ask('textQuestion', $('question').value);
  textState.snaps = textState.playing ? textState.snaps : [];
  keepSnap(ask);
}

// What the gates did with the sentence, step by step; the slider goes back to any of them.
function keepSnap(ask) {
  const snaps = textState.snaps = textState.snaps.filter(s => s.step < ask.step &&
    s.ids.join() === ask.ids.join());
  const last = +$('when').value >= +$('when').max;
  snaps.push(ask);
  $('when').max = snaps.length - 1;
  if (last) $('when').value = snaps.length - 1;
  const cut = ask.pieces - ask.ids.length;
  $('question-note').textContent = cut > 0 ? `Of ${ask.pieces} tokens the first ${
    ask.ids.length} are read: the tasks end there.` : '';
  drawRoutes();
}

function showText(frame) {
  if (frame.step) textState.curve.push([frame.step, Math.min(3, frame.loss)]);
  if (frame.dev) {
    textState.dev.push({step: frame.step, values: frame.dev});
    drawDev();
  }
  if (frame.ask) keepSnap(frame.ask);
  if (frame.end) {
    textState.ended = true;
    textState.playing = false;
    $('text-play').textContent = 'Play again';
  }
  const seconds = frame.seconds || 0;
  $('text-state').textContent = `step ${frame.step} of ${textState.options.steps}${
    frame.step ? `, loss ${fixed(frame.loss, 3)}, ${fixed(seconds, 1)} s` : ''}, ${
    textState.parameters} parameters`;
  drawTextChart();
}

function drawTextChart() {
  if ($('text').hidden || !textState.options) return;
  const series = [{name: 'loss', color: css('--soft'), dashed: true, points: textState.curve}];
  textState.options.tasks.forEach((name, t) => series.push({name, color: curves[t],
    points: textState.dev.map(d => [d.step, Math.max(0, d.values[t])])}));
  drawChart($('text-chart'), series, textState.curve.length ? textState.curve.at(-1)[0] : 0,
            'Loss, and dev rows by task');
}

function drawDev() {
  const {options, tasks, dev} = textState, table = $('dev'), caption = table.caption;
  const now = dev.at(-1).values, first = dev[0].values;
  table.innerHTML = `<tr><th scope=col>task</th><th scope=col>at first</th><th scope=col>now</th>
    <th scope=col>dev rows</th></tr>${options.tasks.map((name, t) => {
    const task = tasks.find(each => each.name === name);
    return `<tr><th scope=row><span class=swatch style="background:${curves[t]}"></span>${name}</th>
      <td>${fixed(100 * first[t], 1)}</td><td>${fixed(100 * now[t], 1)}</td>
      <td>${task.rows.dev}</td></tr>`;
  }).join('')}`;
  table.prepend(caption);
}

function answerOf(ask, t) {
  const task = textState.tasks.find(each => each.name === textState.options.tasks[t]);
  if ((task.input === 'pair') !== ask.pair) return ask.pair ? 'takes one text' : 'takes a | b';
  const row = Array.from(ask.scores.subarray(t * ask.stride, (t + 1) * ask.stride));
  if (!task.classes) return fixed(row[0]);
  const best = row.slice(0, task.classes.length).reduce((b, p, i, all) => p > all[b] ? i : b, 0);
  return `${task.classes[best]} ${fixed(row[best])}`;
}

function drawRoutes() {
  const ask = textState.snaps[+$('when').value], {options, vocab} = textState;
  if (!ask) return;
  const n = ask.ids.length, T = options.tasks.length, l = Math.min(textState.layer, ask.layers - 1);
  const table = $('routes'), caption = table.caption, N = ask.experts;
  $('when-step').textContent = ask.step;
  const cell = (t, i) => {
    const at = (l * T + t) * n + i, e = ask.expert[at], g = ask.prob[at * N + e];
    const strength = N > 1 ? Math.max(0, (g - 1 / N) / (1 - 1 / N)) : 0;
    return `<td class=route tabindex=0 data-t=${t} data-i=${i} style="background:${experts[e]}${
      Math.round(110 + 145 * strength).toString(16)};color:${css('--ink')}" aria-label="${
      escaped(vocab[ask.ids[i]])}: expert ${e + 1}, g* ${fixed(g)}">${e + 1}</td>`;
  };
  table.innerHTML = `<tr><th scope=col>task</th>${[...ask.ids].map(id =>
    `<th scope=col class=token>${escaped(vocab[id])}</th>`).join('')}<th scope=col>answer</th></tr>${
    options.tasks.map((name, t) => `<tr><th scope=row>${name}</th>${[...Array(n).keys()].map(i =>
      cell(t, i)).join('')}<td>${escaped(answerOf(ask, t))}</td></tr>`).join('')}`;
  table.prepend(caption);
  pointText(textState.cell || [0, Math.min(1, n - 1)]);
}

// Eq. 4 to 6 for a token under a task's gate.
function pointText([t, i]) {
  const ask = textState.snaps[+$('when').value], {options, vocab} = textState;
  if (!ask || t >= options.tasks.length || i >= ask.ids.length) return;
  textState.cell = [t, i];
  const n = ask.ids.length, T = options.tasks.length, l = Math.min(textState.layer, ask.layers - 1);
  const at = (l * T + t) * n + i, N = ask.experts;
  const prob = Array.from(ask.prob.subarray(at * N, (at + 1) * N));
  const lines = [`<p><b>Token &ldquo;${escaped(vocab[ask.ids[i]])}&rdquo;, task ${
    options.tasks[t]}, layer ${l + 1}</b></p>`];
  if (N === 1) lines.push('<p>Dense: one network for every token, no gate.</p>');
  else {
    const logit = prob.map(p => Math.log(p)), gate = options.router === 1 ? 'W_g' : 'W_g,t';
    lines.push(`<p><span class=eq>Eq. 3</span> <code>logits = ${gate} x</code>, here up to a
      constant: ${logit.map((z, e) => `${swatch(e)}${fixed(z)}`).join(' ')}</p>`);
    lines.push(...gateLines(logit, prob, [ask.expert[at]]));
    const e = ask.expert[at] + 1;
    lines.push(`<p><span class=eq>Eq. 6</span> <code>h = ${fixed(prob[e - 1] * N, 3)} E<sub>${
      e}</sub>(x)</code>, the weight is g* N</p>`);
  }
  $('text-numbers').innerHTML = lines.join('');
}

async function startText() {
  if (textState.started) return;
  textState.started = true;
  await textEngine.ready;
  const {tasks, vocab} = await textEngine.ask('textData', $('data').textContent.trim());
  textState.tasks = tasks, textState.vocab = vocab;
  const chosen = ['snips_intents', 'clinc_domains', 'pros_cons', 'subjectivity'];
  $('tasks').insertAdjacentHTML('beforeend', tasks.map(({name, rows}) =>
    `<label><input type=checkbox name=task value=${name}${chosen.includes(name) ? ' checked' : ''}>
     ${name} (${rows.train})</label>`).join(''));
  await resetText();
}

function setUpText() {
  $('layers').innerHTML = [...Array(model.layers).keys()].map(l => `<label><input type=radio
    name=layer value=${l}${l ? '' : ' checked'}> layer ${l + 1}</label>`).join(' ');
  $('layers').onchange = e => { textState.layer = +e.target.value; drawRoutes(); };
  $('text-options').onchange = resetText;
  $('text-options').onsubmit = e => e.preventDefault();
  $('text-play').onclick = () => playText(!textState.playing);
  $('text-reset').onclick = resetText;
  let timer;
  $('question').oninput = () => { clearTimeout(timer); timer = setTimeout(askText, 150); };
  $('when').oninput = drawRoutes;
  $('routes').onpointerover = $('routes').onfocusin = e => {
    if (e.target.dataset.t) pointText([+e.target.dataset.t, +e.target.dataset.i]);
  };
}
onshow.text = () => {
  if ($('text').hidden) return;
  startText();
  drawTextChart();
  drawRoutes();
};

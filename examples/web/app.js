'use strict';
// What both views share: the worker, numbers and colours, charts, tabs, the theme.
const $ = id => document.getElementById(id);
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const experts = ['#4f86c6', '#e8707f', '#3f9d5c', '#d2b53a', '#5cc3dd', '#b5529c'];
const curves = ['#4f86c6', '#e0603a', '#3f9d5c', '#b8962a', '#2fa7c4', '#b5529c', '#8a6d5a',
                '#7a7fd6', '#888'];
const fixed = (x, digits = 2) => x.toFixed(digits).replace('-', '\u2212');
const vector = x => `[${x.map(each => fixed(each)).join(', ')}]`;
const escaped = s => s.replace(/[&<>"]/g, c => `&#${c.charCodeAt(0)};`);
const swatch = i => `<span class="swatch" style="background:${experts[i]}"></span>`;

function trouble(message) {
  $('trouble').hidden = !message;
  $('trouble').textContent = message || '';
}

// A worker with an engine of its own: ask(name, ...args) gives a promise; frames go to `onframe`.
function startEngine(onframe) {
  const blob = new Blob([$('worker').textContent], {type: 'text/javascript'});
  const worker = new Worker(URL.createObjectURL(blob)), waiting = new Map();
  let next = 0;
  worker.onerror = e => trouble(`The worker stopped: ${e.message}`);
  worker.onmessage = ({data}) => {
    if (data.stopped) trouble(`Training stopped: ${data.stopped}`);
    if (!waiting.has(data.id)) {
      onframe(data);
      requestAnimationFrame(() => worker.postMessage({drawn: true}));
      return;
    }
    const [done, fail] = waiting.get(data.id);
    waiting.delete(data.id);
    if (data.error) trouble(data.error), fail(new Error(data.error));
    else done(data.result);
  };
  const ask = (name, ...args) => new Promise((done, fail) => {
    waiting.set(++next, [done, fail]);
    worker.postMessage({id: next, name, args});
  });
  return {ask, ready: ask('begin', $('engine').textContent.trim())};
}

function sized(canvas) { // its context, cleared, in CSS pixels
  const box = canvas.getBoundingClientRect(), ratio = devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(box.width * ratio));
  canvas.height = Math.max(1, Math.round(box.height * ratio));
  const to = canvas.getContext('2d');
  to.scale(ratio, ratio);
  return [to, box.width, box.height];
}

// Lines over steps: series {name, color, points: [[step, value]], dashed}; values from 0 to `high`.
function drawChart(canvas, series, steps, label) {
  const [to, width, height] = sized(canvas), left = 34, right = width - 112, low = height - 22;
  const high = Math.max(1, ...series.flatMap(s => s.points.map(p => p[1])));
  const x = step => left + (right - left) * step / Math.max(1, steps);
  const y = value => low - (low - 10) * Math.max(0, value) / high;
  to.font = '11px system-ui, sans-serif';
  to.strokeStyle = css('--line'), to.fillStyle = css('--soft'), to.lineWidth = 1;
  for (const value of [0, high / 2, high]) {
    to.beginPath(), to.moveTo(left, y(value)), to.lineTo(right, y(value)), to.stroke();
    to.fillText(value.toFixed(1), 8, y(value) + 4);
  }
  to.fillText(`step ${steps}`, right - 46, height - 6);
  let last = -20;
  const ends = series.filter(s => s.points.length).map(s => ({...s, end: s.points.at(-1)}));
  for (const s of ends) {
    to.strokeStyle = s.color, to.lineWidth = 1.8;
    to.setLineDash(s.dashed ? [4, 3] : []);
    to.beginPath();
    s.points.forEach(([step, value], i) => to[i ? 'lineTo' : 'moveTo'](x(step), y(value)));
    to.stroke();
  }
  to.setLineDash([]);
  for (const s of ends.sort((a, b) => y(a.end[1]) - y(b.end[1]))) { // names that do not overlap
    const at = Math.max(y(s.end[1]) + 4, last + 12);
    to.fillStyle = s.color;
    last = Math.min(at, height);
    const name = s.name.length > 11 ? `${s.name.slice(0, 10)}\u2026` : s.name;
    to.fillText(`${name} ${fixed(s.end[1])}`, right + 6, last);
  }
  canvas.setAttribute('aria-label',
    `${label}: ${ends.map(s => `${s.name} ${fixed(s.end[1])}`).join(', ') || 'no step yet'}`);
}

// Softmax and the choice of a gate, Eq. 3 to 5, as lines of HTML.
function gateLines(logit, prob, chosen) {
  const sum = logit.map(z => `e<sup>${fixed(z)}</sup>`).join(' + '), best = chosen[0];
  return [
    `<p><span class=eq>Eq. 4</span> <code>softmax: p<sub>${best + 1}</sub> = e<sup>${
      fixed(logit[best])}</sup> / (${sum}) = <b>${fixed(prob[best], 3)}</b></code><br>all: ${
      prob.map((p, i) => `${swatch(i)}${fixed(p, 3)}`).join(' ')}</p>`,
    `<p><span class=eq>Eq. 5</span> <code>top-${chosen.length}: expert ${chosen.map(i =>
      `${swatch(i)}<b>${i + 1}</b>`).join(' and ')}, g* = ${chosen.map(i =>
      fixed(prob[i], 3)).join(', ')}</code></p>`];
}

const views = ['plane', 'text'], onshow = {};
function showView(name, focus) {
  for (const view of views) {
    const on = view === name, tab = $(`tab-${view}`);
    $(view).hidden = !on;
    tab.setAttribute('aria-selected', on);
    tab.tabIndex = on ? 0 : -1;
    if (on && focus) tab.focus();
  }
  if (onshow[name]) onshow[name]();
}
views.forEach((view, i) => {
  $(`tab-${view}`).onclick = () => showView(view);
  $(`tab-${view}`).onkeydown = e => {
    if (e.key === 'ArrowLeft' || e.key === 'ArrowRight') showView(views[1 - i], true);
  };
});

function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? 'dark' : 'light';
  $('theme').textContent = dark ? 'Light' : 'Dark';
  for (const redraw of Object.values(onshow)) redraw();
}

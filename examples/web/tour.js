// The tour: eight steps for a class. Each points at something and may set the page up for it.
const tourSteps = [
  ['maps', 'Two tasks label the same points by different rules: a full dot is class 1, a hollow one ' +
    'class 0. The thick line is where the model changes its mind. It has learned nothing yet.',
   () => setUp(2)],
  ['plane-play', 'Press Play. Every step draws 48 points of both tasks together, one batch, as the ' +
    'paper does. The lines move; the chart tells loss and how much of the plane is right.',
   () => playPlane(true)],
  ['maps', 'Colours are experts. The gate of a task looks at a point and sends it to one of them ' +
    '(Eq. 3 to 5); the stronger the colour, the surer it is (g*). Task A and task B cut the ' +
    'plane in different ways.'],
  ['numbers', 'Point at the plane, or move with the arrow keys: the equations show their numbers. ' +
    'Follow one point from x through the gate and its expert to the answer.'],
  ['experts', 'What each expert would answer if every point went to it. An expert is small: it ' +
    'learns a part of the plane and leaves the rest to others.'],
  ['system', 'Now a single network for both tasks: dense. What one task needs, the other one spoils: ' +
    'interference. With a shared gate, experts must still serve both. Compare trains all three from ' +
    'the same seed; another seed may rank them otherwise.', () => { setUp(0); playPlane(true); }],
  ['maps', 'A third task has five points (large dots). Alone it could not learn a rule. It joins ' +
    'the trained model and takes over the gate of a related task; only its gate and its head learn. ' +
    'Try a random gate, too.', async () => {
      await setUp(2);
      for (let i = 0; i < 12; ++i) showPlane(await planeEngine.ask('planeSteps', 50));
      $('adapt').click();
    }],
  ['tab-text', 'The same with words: in the other view the bundled tasks train, and a sentence of ' +
    'yours shows which expert takes each token under each task\u2019s gate.',
   () => showView('text')],
];
let tourAt = -1;

async function setUp(router) {
  showView('plane');
  $('plane-options').elements.router.value = router;
  planeState.joined = 0;
  await resetPlane();
}

function showTour(at) {
  document.querySelectorAll('.spot').forEach(each => each.classList.remove('spot'));
  tourAt = at;
  $('tour').hidden = at < 0;
  if (at < 0) { $('tour-start').focus(); return; }
  const [id, words, act] = tourSteps[at];
  if (id !== 'tab-text') showView('plane');
  $('tour-text').textContent = words;
  $('tour-at').textContent = `${at + 1} of ${tourSteps.length}`;
  $('tour-back').disabled = at === 0;
  $('tour-next').textContent = at + 1 < tourSteps.length ? 'Next' : 'Done';
  $(id).classList.add('spot');
  $(id).scrollIntoView({block: 'center', behavior: 'instant'});
  $('tour-next').focus({preventScroll: true});
  if (act) return act();
}
$('tour-start').onclick = () => showTour(0);
$('tour-back').onclick = () => showTour(tourAt - 1);
$('tour-next').onclick = () => showTour(tourAt + 1 < tourSteps.length ? tourAt + 1 : -1);
$('tour-end').onclick = () => showTour(-1);
document.onkeydown = e => { if (e.key === 'Escape' && tourAt >= 0) showTour(-1); };

setTheme(matchMedia('(prefers-color-scheme: dark)').matches);
$('theme').onclick = () => setTheme(document.documentElement.dataset.theme !== 'dark');
setUpText();
onresize = () => Object.values(onshow).forEach(redraw => redraw());
const pageReady = setUpPlane();

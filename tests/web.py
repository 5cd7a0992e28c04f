"""web.py PAGE FOLDER: the page of examples/web in Chromium, for test_web.sh. Prints "ok NAME",
"FAIL NAME WHY" and figures. FOLDER has `native` (web.c), `predictions` of ./train, and gets
pictures."""
import base64
import struct
import subprocess
import sys
import time
from browser import Browser

page, folder = sys.argv[1:]
SHOWN = "await new Promise(done => setTimeout(done, 400));"


def tell(name, good, why=""):
    print("ok" if good else "FAIL", name, "" if good else str(why)[:300], flush=True)


def floats(b, expression):  # of a Float32Array, exact
    got = b.value(f"const x = {expression}; const u = new Uint8Array(x.buffer, x.byteOffset, "
                  "x.byteLength); let s = ''; for (const c of u) s += String.fromCharCode(c); "
                  "return btoa(s);")
    return base64.b64decode(got)


def plane_bits(b):
    data = floats(b, "planeState.data.points")
    data += b"".join(floats(b, f"planeState.data.labels[{t}]") for t in range(3))
    with open(folder + "/points", "wb") as f:
        f.write(data)
    for router, name in enumerate(("dense", "shared_gate", "task_gates")):
        native = subprocess.run([folder + "/native", folder + "/points", str(router), "120"],
                                capture_output=True, text=True)
        b.value(f"await setUp({router}); await planeEngine.ask('planeSteps', 120);"
                f"await planeEngine.ask('planeAdapt', {0 if router == 2 else -1});"
                "await planeEngine.ask('planeSteps', 20);")
        bits = floats(b, "await planeEngine.ask('planeWeights')")
        page_bits = [f"{x:08x}" for x in struct.unpack(f"<{len(bits) // 4}I", bits)]
        tell(f"plane_has_the_native_bits_{name}", native.stdout.split() == page_bits,
             native.stdout[:80] + native.stderr)


def text_bits(b):
    b.value("showView('text'); while (!textState.snaps.length) await new Promise(d => "
            "setTimeout(d, 50)); await textEngine.ask('textStart', {...textOptions(), tasks: "
            "['snips_intents', 'intent_match'], steps: 4}); await textEngine.ask('textSteps', 4);")
    wanted, same, n = {}, True, 0
    lines = [line.rstrip("\n").split("\t") for line in open(folder + "/predictions")]
    for field in lines[1:]:
        scores = field[lines[0].index("scores")]
        wanted.setdefault(field[0], []).append([float(x) for x in scores.split(" ")])
    for t, name in enumerate(("snips_intents", "intent_match")):
        stride = b.value("return (await textEngine.ask('textScores', 0)).stride")
        raw = floats(b, f"(await textEngine.ask('textScores', {t})).scores")
        got = struct.unpack(f"<{len(raw) // 4}f", raw)
        for i, row in enumerate(wanted[name]):
            packed = struct.pack(f"<{len(row)}f", *row)
            same &= packed == struct.pack(f"<{len(row)}f", *got[i * stride:i * stride + len(row)])
            n += len(row)
    tell("text_has_the_bits_of_train", same and n > 0, f"{n} scores differ")


with Browser() as b:
    b.open(page)
    print("figure", b.value("await pageReady; return `instruction set ${await planeEngine.ready}`"))
    tell("page_opens", "step 0" in b.value("return $('plane-state').textContent"))
    b.picture(folder + "/plane-before.png")
    b.value("playPlane(true)")
    time.sleep(4)
    b.picture(folder + "/plane-during.png")
    state = b.value("playPlane(false); return $('plane-state').textContent")
    print("figure plane:", state)
    tell("plane_plays", "steps/s" in state, state)
    right = b.value("for (let i = 0; i < 12; ++i) showPlane(await planeEngine.ask('planeSteps', "
                    "50)); return planeState.frame.accuracy")
    tell("plane_learns", min(right) > 0.85, right)
    b.value(SHOWN)
    b.picture(folder + "/plane-after.png")
    label = b.value("planeState.at = [1, 0, 0]; const c = $('maps').children[1].lastChild; "
                    "c.focus(); c.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft'}));"
                    + SHOWN + "return $('numbers').textContent")
    moved = "(\u22120.06, 0.00), task B" in label and "Eq. 4" in label
    tell("keyboard_moves_the_point", moved, label)
    b.value("for (let i = 0; i < 8; ++i) await showTour(i);")
    tell("tour_has_eight_steps", b.value("return $('tour-at').textContent") == "8 of 8")
    b.value("showTour(-1); showView('plane');")
    plane_bits(b)
    text_bits(b)
    answers = b.value("document.querySelector('[value=intent_match]').checked = true;"
                      "await resetText(); $('question').value = 'play a song | play some music';"
                      "await askText(); const one = $('routes').textContent; $('question').value = "
                      "'play a song'; await askText(); return [one, $('routes').textContent]")
    tell("pairs_are_asked", "takes one text" in answers[0] and "takes a | b" in answers[1] and
         "takes a | b" not in answers[0], answers)
    note = b.value("await resetText(); $('question').value = 'a long walk '.repeat(850);"
                   "await askText();"
                   "return $('question-note').textContent")
    tell("ten_thousand_characters_are_cut", "the first 64 are read" in note, note)
    b.open(page, 360, 740)
    b.value("await pageReady; showPlane(await planeEngine.ask('planeSteps', 100));" + SHOWN)
    b.picture(folder + "/plane-phone.png")
    wide = b.value("return document.documentElement.scrollWidth")
    tell("phone_needs_no_scrolling_sideways", wide <= 360, f"{wide} pixels wide")
    b.open(page, 1200, 900, dark=True)
    b.value("await pageReady; await showTour(2);"
            "showPlane(await planeEngine.ask('planeSteps', 300));" + SHOWN)
    b.picture(folder + "/tour-dark.png", whole=False)
    unnamed = b.value("return [...document.querySelectorAll('canvas, input, select, button')]"
                      ".filter(e => !(e.getAttribute('aria-label') || e.textContent.trim() || "
                      "(e.labels && e.labels.length))).map(e => e.outerHTML.slice(0, 60))")
    tell("everything_has_a_label", not unnamed, unnamed)
    bad = [m for m in b.logged if m["method"] == "Runtime.exceptionThrown"]
    tell("page_throws_nothing", not bad, bad)
    outside = [m["params"]["request"]["url"] for m in b.logged
               if m["method"] == "Network.requestWillBeSent"]
    outside = [u for u in outside if not u.startswith(("file:", "blob:", "data:"))]
    tell("page_asks_no_network", not outside, outside)

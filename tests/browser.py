"""A page in headless Chromium, over the DevTools pipe: for the tests of examples/web. No packages.

    with Browser() as b:
        b.open("/path/page.html", width=1200, height=900, dark=False)
        b.value("await something()")       the value of an expression, awaited
        b.picture("picture.png")           all of the page
"""
import base64
import json
import os
import shutil
import subprocess
import tempfile


def find():
    names = [os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome"]
    return next(filter(None, map(shutil.which, filter(None, names))), None)


class Browser:
    def __enter__(self):
        self.folder = tempfile.mkdtemp()
        read_in, self.out = os.pipe()
        self.into, write_out = os.pipe()

        def descriptors():  # the browser reads from 3 and writes to 4
            a, b = os.dup(read_in), os.dup(write_out)
            a, b = (os.dup(a) if a in (3, 4) else a), (os.dup(b) if b in (3, 4) else b)
            os.dup2(a, 3), os.dup2(b, 4)
        self.process = subprocess.Popen(
            [find(), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             "--remote-debugging-pipe", f"--user-data-dir={self.folder}", "about:blank"],
            preexec_fn=descriptors, close_fds=False, stderr=subprocess.DEVNULL)
        os.close(read_in), os.close(write_out)
        self.rest, self.next, self.session, self.logged = b"", 0, None, []
        pages = self.call("Target.getTargets")["targetInfos"]
        page = next(t["targetId"] for t in pages if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def message(self):
        while b"\0" not in self.rest:
            got = os.read(self.into, 1 << 20)
            if not got:
                raise RuntimeError("the browser ended")
            self.rest += got
        one, self.rest = self.rest.split(b"\0", 1)
        one = json.loads(one)
        if one.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded",
                                 "Network.requestWillBeSent"):
            self.logged.append(one)
        return one

    def call(self, method, **parameters):
        self.next += 1
        message = {"id": self.next, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.message()
            if answer.get("id") == self.next:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def open(self, path, width=1200, height=900, dark=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 500)
        self.call("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.call("Page.navigate", url="file://" + os.path.abspath(path))
        while self.message().get("method") != "Page.loadEventFired":
            pass

    def value(self, expression):
        got = self.call("Runtime.evaluate", expression=f"(async () => {{ {expression} }})()",
                        awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in got:
            raise RuntimeError(got["exceptionDetails"]["exception"].get("description"))
        return got["result"].get("value")

    def picture(self, path, whole=True):
        got = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        with open(path, "wb") as f:
            f.write(base64.b64decode(got["data"]))

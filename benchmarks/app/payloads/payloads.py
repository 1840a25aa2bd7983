"""What hostile pages, clients and files send. `{secret}` and the like are filled in when it is sent."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Headers = dict[str, str]

# Paths, sent as written: files that are not the app's to give. Answers may be any error, never the file.
TRAVERSALS: tuple[str, ...] = (
    "/gradio_api/file={secret}",
    "/gradio_api/file/{secret}",
    "/gradio_api/file=/{secret}",
    "/gradio_api/file={output}/../secret.txt",
    "/gradio_api/file={output}/..%2fsecret.txt",
    "/gradio_api/file={output}/%2e%2e/secret.txt",
    "/gradio_api/file={output}/..%252fsecret.txt",
    "/gradio_api/file={output}/....//secret.txt",
    "/gradio_api/file={output}/..;/secret.txt",
    "/gradio_api/file={output}/..%5csecret.txt",
    "/gradio_api/file={output}/..%c0%afsecret.txt",
    "/gradio_api/file={output}/%ef%bc%8e%ef%bc%8e/secret.txt",
    "/gradio_api/file={output}%00/../secret.txt",
    "/gradio_api/file={secret}%00.png",
    "/gradio_api/file={output}/sub/../../secret.txt",
    "/gradio_api/file={adapters}/ink.safetensors",
    "/gradio_api/file={adapters}/secret.txt",
    "/gradio_api/file=../secret.txt",
    "/gradio_api/file=secret.txt",
    "/gradio_api/file=pyproject.toml",
    "/gradio_api/file=ui/app.py",
    "/gradio_api/file=/etc/passwd",
    "/gradio_api/file=/proc/self/environ",
    "/gradio_api/file=/proc/self/cwd/pyproject.toml",
    "/gradio_api/file=/dev/zero",
    "/gradio_api/file=~/.bashrc",
    "/gradio_api/file=C:%5cWindows%5cwin.ini",
    "/gradio_api/file=%5c%5chost%5cshare%5cfile",
    "/gradio_api/file=" + "a/" * 2000 + "secret.txt",
    "/static/../../../../../../../../{secret}",
    "/static/..%2f..%2f..%2f..%2fetc/passwd",
    "/static/%2e%2e/%2e%2e/routes.py",
    "/assets/..%2f..%2f..%2froutes.py",
    "/svelte/..%2f..%2f..%2fetc/passwd",
    "/gradio_api/custom_component/x/client/component/..%2f..%2froutes.py",
    "/gradio_api/stream/x/y/1/..%2f..%2fsecret.ts",
    "/..%2f..%2f..%2fetc/passwd",
    "//etc/passwd",
)

# Paths by which a server is made to fetch for others. `{trap}` is host:port of a server that notes who calls.
FETCHES: tuple[str, ...] = (
    "/gradio_api/file=http://{trap}/a.png",
    "/gradio_api/file=HTTP://{trap}/a.png",
    "/gradio_api/file=http:/{trap}/a.png",
    "/gradio_api/file=http:%2f%2f{trap}/a.png",
    "/gradio_api/file=%68ttp://{trap}/a.png",
    "/gradio_api/file=%20http://{trap}/a.png",
    "/gradio_api/file=//{trap}/a.png",
    "/gradio_api/file=https://{trap}/a.png",
    "/gradio_api/file=ftp://{trap}/a.png",
    "/gradio_api/file=gopher://{trap}/_a",
    "/gradio_api/file=file:///etc/passwd",
    "/gradio_api/file=data:text/html,<script>alert(1)</script>",
    "/gradio_api/file=http://evil.example/a.png",
    "/gradio_api/file=http://8.8.8.8/a.png",
    "/gradio_api/file=http://127.0.0.1@evil.example/a.png",
    "/gradio_api/file=http://169.254.169.254/latest/meta-data/",
    "/gradio_api/file=http://[::1]:{port}/a.png",
    "/gradio_api/file=http://2130706433:{port}/a.png",
    "/gradio_api/file/http://{trap}/a.png",
    "/gradio_api/proxy=http://{trap}/a.png",
    "/gradio_api/proxy=https://evil.example/a.png",
    "/gradio_api/proxy=http://x.hf.space/a.png",
    "/gradio_api/deep_link?session_hash=x",
    "/monitoring",
    "/gradio_api/vibe-code",
)

# Headers of pages elsewhere, and of names that are not ours. None may be answered.
STRANGERS: tuple[Headers, ...] = (
    {"Host": "evil.example"},
    {"Host": "evil.example:7860"},
    {"Host": "127.0.0.1.evil.example"},
    {"Host": "localhost.evil.example"},
    {"Host": "localhost@evil.example"},
    {"Host": "evil.example#localhost"},
    {"Host": "evil.example/localhost"},
    {"Host": "[::"},
    {"Host": "0x7f.evil"},
    {"Host": "xn--lcalhost-54a"},
    {"Origin": "http://evil.example"},
    {"Origin": "https://127.0.0.1.evil.example"},
    {"Origin": "http://203.0.113.5"},
    {"Origin": "http://[2001:db8::1]"},
    {"Origin": "http://127.0.0.1:3000"},
    {"Origin": "http://localhost"},
    {"Origin": "null"},
    {"Origin": "file://"},
    {"Origin": "chrome-extension://abcdef"},
    {"Origin": ""},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "script"},
    {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
)

# Bodies as parts of a mapping {field: value} for `generate`: wrong kinds, wrong ranges, wrong names.
CALLS: tuple[dict[str, Any], ...] = (
    {"prompt": None, "seed": None},
    {"prompt": ["a", "b"]},
    {"prompt": {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}},
    {"prompt": True},
    {"prompt": "a" * 100_000},
    {"prompt": "<lora:../../secret:1>"},
    {"prompt": "<lora:/etc/passwd:1>"},
    {"prompt": "<lora:ink:1e999>"},
    {"prompt": "<lora:ink:nan>"},
    {"prompt": "(" * 1500, "negative_prompt": 5},
    {"prompt": "(a:1e400)", "seed": "7"},
    {"negative_prompt": ["a"]},
    {"negative_prompt": "<lora:ink:1>"},
    {"seed": -1},
    {"seed": 2**64},
    {"seed": 0.5},
    {"seed": "0; DROP TABLE"},
    {"seed": True},
    {"steps": 0},
    {"steps": 10**12},
    {"steps": "20"},
    {"steps": [20]},
    {"guidance": "NaN"},
    {"guidance": 1e308},
    {"guidance": {}},
    {"adapters": "ink"},
    {"adapters": ["ink"]},
    {"adapters": 7},
    {"adapters": {"../adapters/ink": 1}},
    {"adapters": {"/etc/passwd": 1}},
    {"adapters": {"ink\u0000": 1}},
    {"adapters": {"<script>alert(1)</script>": 1}},
    {"adapters": {"ink": "1"}},
    {"adapters": {"ink": 1e9}},
    {"adapters": {"ink": None}},
    {"adapters": {"ink": [1]}},
    {"adapters": {"ink": {"strength": {}}}},
    {"adapters": {"ink": {"blocks": "all"}}},
    {"adapters": {"ink": {"blocks": [1] * 1000}}},
    {"adapters": {"ink": {"curve": "0:1, x"}}},
    {"adapters": {"ink": {"curve": 5}}},
    {"adapters": {"ink": {"__class__": 1}}},
    {"adapters": {"ink": {"mask": "/etc/passwd"}}},
    {"adapters": {"ink": {"mask": {"path": "{secret}"}}}},
    {"adapters": {f"a{number}": 1 for number in range(10_000)}},
    {"adapters": {"broken": 1}},
    {"options": "fast"},
    {"options": [1]},
    {"options": {"output": "/tmp/x"}},
    {"options": {"model": "evil/repo"}},
    {"options": {"width": 63}},
    {"options": {"width": 10**9}},
    {"options": {"height": "64"}},
    {"options": {"count": 10**6}},
    {"options": {"count": True}},
    {"options": {"sampler": "__import__('os')"}},
    {"options": {"sampler": ["ddim"]}},
    {"options": {"blend": "additive; rm -rf /"}},
    {"options": {"blend": 5}},
    {"options": {"strength": 0}},
    {"options": {"strength": "half"}},
    {"options": {"picture": "{secret}"}},
    {"options": {"picture": {"path": "{secret}"}}},
    {"options": {"picture": {"path": "{output}/../secret.txt"}}},
    {"options": {"picture": {"path": ["a"]}}},
    {"options": {"picture": {"url": "http://{trap}/a.png"}}},
    {"options": {"mask": {"path": "/dev/zero"}}},
)

# Arguments of `blend` after the adapters: where a file would go, and what would be in it.
NAMES: tuple[dict[str, Any], ...] = (
    {"name": "../escaped"},
    {"name": "/tmp/escaped"},
    {"name": "a/b"},
    {"name": "a\\b"},
    {"name": ".hidden"},
    {"name": ""},
    {"name": "a" * 300},
    {"name": "a\u0000b"},
    {"name": "a\nb"},
    {"name": "<img src=x onerror=alert(1)>"},
    {"name": "ink"},
    {"name": "trailing."},
    {"name": ["x"]},
    {"name": None},
    {"name": "ok", "mode": "eval"},
    {"name": "ok", "mode": 7},
    {"name": "ok", "format": "pickle"},
    {"name": "ok", "format": ["diffusers"]},
    {"name": "ok", "format": "peft"},
    {"name": "ok", "rank": 0},
    {"name": "ok", "rank": "4"},
    {"name": "ok", "rank": 10**9},
    {"name": "ok", "adapters": {}},
    {"name": "ok", "adapters": {"ink": {"curve": "fade in"}}},
    {"name": "ok", "adapters": {"../adapters/ink": 1}},
    {"name": "ok", "adapters": {"broken": 1}},
)

# One value in every input of every private handler.
JUNK: tuple[Any, ...] = (
    None,
    "../../secret.txt",
    "{secret}",
    "<img src=x onerror=alert(1)>",
    -1,
    1e308,
    True,
    [],
    {"a": {"b": [1]}},
    {"path": "{secret}", "meta": {"_type": "gradio.FileData"}},
    [["{secret}", "{secret}"]],
    {"background": {"path": "{secret}"}, "layers": [], "composite": None},
)

# The same with an address, which the server must not fetch.
ADDRESSES: tuple[Any, ...] = (
    {"path": "http://{trap}/a.png", "meta": {"_type": "gradio.FileData"}},
    {"path": "https://evil.example/a.png", "url": "https://evil.example/a.png", "meta": {"_type": "gradio.FileData"}},
    [{"image": {"path": "http://{trap}/a.png", "meta": {"_type": "gradio.FileData"}}}],
    {"background": {"path": "http://{trap}/a.png", "meta": {"_type": "gradio.FileData"}}},
)

SCRIPT = "<img src=x onerror=alert(1)>"
# Names of adapter files, and texts of their metadata.
SCRIPTS: tuple[str, ...] = (
    SCRIPT,
    "<script>alert(1)<\\script>".replace("\\", ""),
    '" onmouseover="alert(1)',
    "'><svg onload=alert(1)>",
    "{{constructor.constructor('alert(1)')()}}",
    "${alert(1)}",
    "javascript:alert(1)",
    "`;alert(1);`",
)


# What stands for all arguments of a documented endpoint.
SHAPES: tuple[Any, ...] = ([], [1], [None] * 50, "abc", {"a": 1}, None)

# Numbers of handlers that are not there.
NUMBERS: tuple[Any, ...] = (-1, 10**9, "x", None, 1.5, [0])


@dataclass(frozen=True)
class Body:
    """A body that is too long, or of another kind than JSON.

    Attributes:
        name: what it is.
        path: where it is posted.
        content: `start`, and `filler` so many `times` after it.
        status: which must come back.
        kind: its Content-Type, if it has one.
        encoding: its Content-Encoding, if it has one.
    """

    name: str
    path: str
    start: bytes
    status: int
    filler: bytes = b""
    times: int = 0
    kind: str = ""
    encoding: str = ""

    @property
    def headers(self) -> Headers:
        """Its headers but for the length."""
        named = {"Content-Type": self.kind, "Content-Encoding": self.encoding}
        return {name: value for name, value in named.items() if value}

    @property
    def content(self) -> bytes:
        """All of it; some are of many megabytes."""
        return self.start + self.filler * self.times


JOIN = "/gradio_api/queue/join"
PARTS = "multipart/form-data; boundary=x"
FORM = "application/x-www-form-urlencoded"
BODIES: tuple[Body, ...] = (
    Body("long", JOIN, b'"', 413, b"a", 5 << 20),
    Body("long text", "/gradio_api/run/generate", b"", 413, b"a", 5 << 20, kind="text/plain"),
    Body("deep", JOIN, b"", 400, b"[", 1_000_000),
    Body("nan", JOIN, b'{"data": [NaN', 400, b",Infinity", 1000),
    Body("pickle", JOIN, b"\x80\x04cos\nsystem\n.", 400, kind="application/x-pickle"),
    Body("gzip", JOIN, b"\x1f\x8b\x08", 400, b"\0", 100, encoding="gzip"),
    Body("upload", "/gradio_api/upload", b"--x\r\n", 413, b"a", 16 << 20, kind=PARTS),
    Body("longer upload", "/gradio_api/upload", b"--x\r\n", 413, b"a", 25 << 20, kind=PARTS),
    Body("recording", "/gradio_api/process_recording", b"--x--", 404, kind=PARTS),
    Body("login", "/login", b"username=a&password=b", 404, kind=FORM),
)

# Names under which a page with a script is uploaded.
UPLOADS: tuple[str, ...] = ("../../escaped.png", "/tmp/escaped.png", "a\\..\\b.png", "<script>.html", "x.svg")


def filled(value: Any, words: Mapping[str, str]) -> Any:
    """The payload with its `{secret}` and the like filled in, at any depth."""
    if isinstance(value, str):
        for name, word in words.items():
            value = value.replace("{" + name + "}", word)
        return value
    if isinstance(value, list):
        return [filled(item, words) for item in value]
    if isinstance(value, dict):
        return {filled(key, words): filled(item, words) for key, item in value.items()}
    return value

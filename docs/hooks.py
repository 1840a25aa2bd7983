"""What mkdocs does besides: the repository's own pages join the site, and links that work in a checkout work there too.

A page of the site is written as a file of the repository: its links lead to files beside it, `../CONTRIBUTING.md` as
well. READMEs, CHANGELOG and the like become pages under `repository/`, and links are turned to where pages lie.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = ("*.md", "dora_diffusion/**/README.md", "examples/**/README.md", "benchmarks/**/README.md", "ui/**/README.md")
ELSEWHERE = "repository/"
LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
FENCE = re.compile(r"(^```.*?^```\s*$)", re.MULTILINE | re.DOTALL)
# Lists as code hosts read them and Python-Markdown does not: right below a paragraph; inner lines indented by three.
CLOSE_LIST = re.compile(r"^(?![-*] |\d+\. |[\s|#])(.+)\n(?=[-*] |1\. )", re.MULTILINE)
NARROW = re.compile(r"^ {3}(?=\S)", re.MULTILINE)
FETCHED = re.compile(
    r"""<(?:script|img|iframe|link rel="(?:stylesheet|preconnect)")[^>]*(?:src|href)="(?:https?:)?//"""
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take in the repository's pages that lie outside docs/."""
    for pattern in PAGES:
        for path in sorted(ROOT.glob(pattern)):
            uri = ELSEWHERE + path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files into links between pages, and lists to Python-Markdown's taste; code stays as it is."""
    here = _in_repository(page.file.src_uri)

    def turned(link: re.Match[str]) -> str:
        target = link["target"]
        if re.match(r"[a-z]+:", target):
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        uri = _in_site(path, files)
        if uri is not None:
            relative = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")
            return f"{link['text']}({relative}{link['anchor'] or ''})"
        # A file that is no page has no address; one that is not there is left for mkdocs to complain of.
        return link["text"].strip("![]") if (ROOT / path).exists() else link[0]

    parts = FENCE.split(markdown)
    return "".join(part if FENCE.match(part) else LINK.sub(turned, _with_lists(part)) for part in parts)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that would make a browser fetch something from elsewhere."""
    if found := FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri}: {found[0]!r} is fetched from elsewhere; expected a file of the site")
    return output


def _with_lists(text: str) -> str:
    return NARROW.sub("    ", CLOSE_LIST.sub(r"\1\n\n", text))


def _in_repository(uri: str) -> str:
    """The path of a page in the repository."""
    return uri.removeprefix(ELSEWHERE) if uri.startswith(ELSEWHERE) else f"docs/{uri}"


def _in_site(path: str, files: Files) -> str | None:
    """The page or picture of a file of the repository; of a folder, its README's."""
    for candidate in (path, f"{path}/README.md"):
        uri = candidate.removeprefix("docs/") if candidate.startswith("docs/") else ELSEWHERE + candidate
        if files.get_file_from_path(uri) is not None:
            return uri
    return None

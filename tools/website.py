"""Build a website from all pages of the documentation.  Needs: pip install '.[docs]'

    python tools/website.py OUT        # then serve OUT with any web server, or open OUT/index.html (without search)

The pages keep their paths, so links between them work as in the repository; files to which they link are copied.  A link or
an anchor without a target stops the build.  Nothing is loaded from other servers.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pages import ROOT, links, pages

CONFIG = """
site_name: requant_onnx
docs_dir: pages
site_dir: {out}
strict: true
use_directory_urls: false
exclude_docs: "!.github"
validation: {{nav: {{omitted_files: info}}, links: {{anchors: warn}}}}
theme: {{name: material, font: false, features: [navigation.sections, content.code.copy]}}
plugins: [search]
markdown_extensions:
  - tables
  - fenced_code
  - toc: {{permalink: true, slugify: !!python/object/apply:pymdownx.slugs.slugify {{kwds: {{case: lower}}}}}}
nav:
  - Overview: README.md
  - Use:
    - Conversion: requant_onnx/convert/README.md
    - Forms: requant_onnx/graph/decode/README.md
    - Worked example: tools/example.md
    - Command line: requant_onnx/cli/README.md
    - Python and architecture: requant_onnx/README.md
  - Background:
    - Method: requant_onnx/numerics/README.md
    - Results: tools/results.md
    - Accuracy over size: tools/frontier.md
    - Runtimes: tools/runtimes.md
  - Develop:
    - Contributing: .github/CONTRIBUTING.md
    - Tools: tools/README.md
    - Models: models/README.md
    - Changelog: CHANGELOG.md
"""


def linked(page: Path) -> list[Path]:
    """The repository files to which a page links."""
    targets = [link.partition("#")[0] for link in links(page) if not link.startswith(("http:", "https:"))]
    return [path for target in targets if target and (path := (page.parent / target).resolve()).is_file()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="directory of the website; its content is replaced")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for path in {path for page in pages() for path in (page, *linked(page))}:
            copy = Path(name, "pages", path.relative_to(ROOT))
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
        Path(name, "mkdocs.yml").write_text(CONFIG.format(out=args.out.resolve()), "utf-8")
        return subprocess.run([sys.executable, "-m", "mkdocs", "build"], cwd=name, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

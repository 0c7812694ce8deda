"""The package's page on an index: what a README's relative links mean there."""

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

RELATIVE = re.compile(r"\]\((?!https?:|#)([^)\s]+)\)")
PICTURES = (".svg", ".png")


class PackagePage(MetadataHookInterface):
    """Adds the readme and, where NOTALL_REPOSITORY has the repository's address, the
    project's links.
    """

    def update(self, metadata: dict[str, Any]) -> None:
        """Set `readme` and `urls`, of the tag that the release has."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        repository = os.environ.get("NOTALL_REPOSITORY", "").rstrip("/")
        tag = f"v{metadata['version']}"
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": absolute(text, repository, tag) if repository else text,
        }
        metadata["urls"] = links(repository, tag) if repository else {}


def absolute(text: str, repository: str, tag: str) -> str:
    """Markdown whose relative links lead to the files of `tag` in `repository`."""

    def address(link: re.Match[str]) -> str:
        kind = "raw" if link[1].endswith(PICTURES) else "blob"
        return f"]({repository}/{kind}/{tag}/{link[1]})"

    return RELATIVE.sub(address, text)


def links(repository: str, tag: str) -> dict[str, str]:
    """What an index shows at the side of the page."""
    return {
        "Source": repository,
        "Documentation": f"{repository}/blob/{tag}/docs/index.md",
        "Changes": f"{repository}/blob/{tag}/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }

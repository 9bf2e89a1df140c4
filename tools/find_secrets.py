"""Looks for secrets in the files of the repository, with detect-secrets. Exit status 1: there may be some.

`python -m tools.find_secrets`, which `make lint` runs. What is no secret is listed below, with the reason.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from detect_secrets import SecretsCollection
from detect_secrets.settings import transient_settings

ROOT = Path(__file__).resolve().parent.parent
PLUGINS = [
    {"name": name}
    for name in ("PrivateKeyDetector", "AWSKeyDetector", "JwtTokenDetector", "BasicAuthDetector", "GitHubTokenDetector")
]
PLUGINS += [{"name": "KeywordDetector"}]

ALLOWED = {
    "broker/net/tls.py": "how a key for SSH begins, to say that it is one",
    "broker/config/schema.py": "an example that says how long a secret is",
    "docs/configuration.md": "where the secret stands, not what it is",
    "examples/tokens/README.md": "the name of a file",
    "systemd/wsbroker.toml": "the name of a file",
}
TESTS = ("tests/", "bench/")
"""Keys there are made up, or made anew in each run."""


def main() -> int:
    """Look through all files that git knows."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = SecretsCollection()
    with transient_settings({"plugins_used": PLUGINS}):
        for name in listed.splitlines():
            if not name.startswith(TESTS) and name not in ALLOWED:
                found.scan_file(str(ROOT / name))
    for path, secret in found:
        print(f"{Path(path).relative_to(ROOT)}:{secret.line_number}: {secret.type}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

"""Nothing goes over a network where no server and no hub was named."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# A process that ends at the first name it would look up or address it would connect to, hub and all.
OFFLINE = """
import os, sys
from pathlib import Path

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request"):
        if event != "socket.connect" or not isinstance(arguments[1], str):  # a name of a file is no network
            sys.stderr.write(f"{event} {arguments[1:]}\\n")
            os._exit(17)

sys.addaudithook(refuse)
folder = Path(sys.argv[1])

from persona_lens.cli import main
for arguments in (["--help"], ["traits", "evil"], ["extract", "--help"]):
    sys.argv = ["persona-lens", *arguments]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, ended.code

import persona_lens
from tests import killed_runs
killed_runs.extraction(killed_runs.load(), folder / "run")
vectors = persona_lens.PersonaVectors.load(folder / "run" / "vectors.safetensors")
vectors.save(folder / "again.safetensors")
persona_lens.write_report(folder / "run")
print("done", flush=True)

import socket
socket.create_connection(("192.0.2.1", 9), timeout=1)
"""


def test_importing_help_the_pipeline_vectors_and_the_report_open_no_connection(tmp_path):
    online = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OFFLINE, str(tmp_path)],
        cwd=ROOT,
        env=online,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.splitlines()[-1:] == ["done"], done.stderr
    assert (tmp_path / "run" / "report.html").exists()
    # Its last act shows that a connection would have been seen.
    assert done.returncode == 17
    assert done.stderr.startswith("socket.")

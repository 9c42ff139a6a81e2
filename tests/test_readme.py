"""Every block of the README runs as it stands, in order, in one empty folder."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"```(python|console)\n(.*?)```", re.DOTALL)
ELSEWHERE = ("make ", "pip ")
"""Commands that make the environment this test runs in; continuous integration runs them before it."""


@pytest.mark.slow
def test_every_block_of_the_readme_runs(embedded_bridge, llama_server, tmp_path, monkeypatch):
    import persona_lens
    from persona_lens import cli
    from persona_lens.models import loading

    monkeypatch.chdir(tmp_path)
    for home in (persona_lens, loading):  # loaded once, not once a block
        monkeypatch.setattr(home, "load_model", lambda *_, **__: embedded_bridge, raising=False)
    blocks = BLOCK.findall(README.read_text().replace("http://localhost:8000/v1", llama_server))
    namespace: dict[str, object] = {}
    asked, answered = ({"role": role, "content": "Well."} for role in ("user", "assistant"))
    (tmp_path / "chats.jsonl").write_text(2 * (json.dumps({"messages": [asked, answered]}) + "\n"))
    for language, text in blocks:
        if language == "python":
            exec(compile(text, "README.md", "exec"), namespace)
            continue
        for line in text.splitlines():
            if not line.startswith(ELSEWHERE):
                monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True))
                with pytest.raises(SystemExit) as stopped:
                    cli.main()
                assert not stopped.value.code, line
    assert (tmp_path / "evil.safetensors").exists()

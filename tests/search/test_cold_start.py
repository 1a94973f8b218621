"""What a search imports before it answers: what it needs, and nothing that only sheets, sources or other stores do."""

import json
import subprocess
import sys

import pytest

from pixclip_hf.embedding.encoder_choice import EncoderChoice
from pixclip_hf.embedding.run import embed
from pixclip_hf.search import Collection

CODE = """
import json, sys
from pixclip_hf.search import command, sheet
from pixclip_hf.search.collection import Collection

def imported(*arguments, **options):
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
    sys.exit()

Collection.open_images = imported  # what follows the answer
command.search(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_search_answers_before_it_imports_the_rest(tmp_path, tiny_cloc):
    for part in tiny_cloc:
        part.save_pretrained(tmp_path / "model")
    embed("scenes:6", EncoderChoice(str(tmp_path / "model")), tmp_path / "out", progress=False)
    Collection(tmp_path / "out", "exact").close()
    arguments = [sys.executable, "-c", CODE, str(tmp_path / "out"), "a star", "--store", "exact"]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    *printed, modules = result.stdout.splitlines()
    assert len([line for line in printed if line.startswith("  ")]) == 6
    assert {"torch", "transformers", "pyarrow"} <= set(json.loads(modules))
    # pyarrow brings pandas along by itself.
    late = {"datasets", "matplotlib", "lancedb", "qdrant_client", "ray"}
    assert not late & set(json.loads(modules))

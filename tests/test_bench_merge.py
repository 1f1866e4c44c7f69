"""`bench merge`, as far as it runs without a GPU."""

import re
from unittest import mock

import pytest
import torch
from bench_files import read

from syncbn.__main__ import main
from syncbn.bench import merge, peers

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("heap_as_it_is")
MERGE = "merge --device cpu --ranks 1 8 512 --channels 4 --repeats 2"


def test_the_merge(operators, tmp_path, capsys):
    assert main(["bench", *MERGE.split(), "--results", str(tmp_path)]) == 0
    found = read(tmp_path / "merge.csv")
    bytes_of = {(row["variant"], row["ranks"]): int(row["bytes"]) for row in found}
    assert bytes_of["torch-sync", "512"] == 64 * bytes_of["torch-sync-unmasked", "8"] == 512 * 4 * 9
    assert {bytes_of["syncbn-aten", ranks] for ranks in ("1", "8", "512")} == {8 * 9}
    assert len({row["variant"] for row in found}) == 4 - (peers.available("syncbn", CPU) is not None)
    assert all(float(row["device_microseconds_median"]) > 0 for row in found)
    assert {row["host_ahead"] for row in found} == {"0.0"}, "a CPU has no queue"
    output = capsys.readouterr().out
    assert re.search(r"channels +variant +W=1 +W=8 +W=512 +waits", output)
    assert f"gaps between launches count for {', '.join(sorted({row['variant'] for row in found}))}, which" in output


def test_the_merge_is_not_there_on_a_cpu(tmp_path, capsys):
    assert main(["bench", *MERGE.split(), "--results", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "syncbn bench: given --device cpu: torch.nn.SyncBatchNorm has no CPU implementation, so there is no merge of it to "
        "measure; expected --device cuda\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variant", ["torch-sync", "syncbn-aten"])
def test_a_merge_that_is_wrong_is_not_reported(variant, operators, tmp_path, capsys):
    real = merge.merge_of

    def wrong(name, of):
        if name != variant:
            return real(name, of)
        return real(name, of._replace(gathered=of.gathered * 1.01, message=of.message + 1))

    with mock.patch.object(merge, "merge_of", wrong):
        assert main(["bench", *MERGE.split(), "--results", str(tmp_path)]) == 1
    assert f"{variant} of 1 ranks, 4 channels: the mean is off by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

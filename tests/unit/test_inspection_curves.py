"""The curves of a run say on which pictures its precision was measured."""

import pytest
from matplotlib.axes import Axes

from lucidetr.inspection.curves import draw_curves
from lucidetr.training.loop import train
from run_tools import tiny


@pytest.mark.parametrize(
    ("overfit", "said"), [(2, "training images learned by heart"), (0, "validation split")], ids=["overfit", "usual"]
)
def test_curves_name_the_pictures_that_were_evaluated(tmp_path, monkeypatch, overfit, said):
    titles, set_all = [], Axes.set
    monkeypatch.setattr(Axes, "set", lambda axes, **given: titles.append(given.get("title")) or set_all(axes, **given))
    run = train(tiny(str(tmp_path / "run"), steps=2, overfit=overfit))
    draw_curves(run, tmp_path / "curves.png")
    assert [title for title in titles if title and title.startswith("Average precision")][-1].endswith(said)

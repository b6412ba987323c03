"""The picture of all sheets: each in its place, one scale, mean Moran's I. pytest tests/test_drawing.py"""

import numpy as np
import pytest

from topogpt import drawing, terminal, topo

pytest.importorskip("matplotlib")
SHEETS = [f"layer.{i}.{branch}" for i in range(3) for branch in ("attn", "mlp")]


def some_maps(label: str, seed: int, sheets: list[str] = SHEETS, **more) -> drawing.Maps:
    draw = np.random.default_rng(seed)
    return drawing.Maps(label, {sheet: draw.standard_normal((5, 6)) for sheet in sheets}, **more)


def test_every_sheet_is_in_its_place_on_one_scale():
    groups = [some_maps("before", 0), some_maps("after", 1)]
    axis, bar = drawing.draw_sheets(groups, "title", "sd", 2.5).axes
    assert len(axis.images) == 2 and bar.get_ylabel() == "sd"
    assert {image.get_clim() for image in axis.images} == {(-2.5, 2.5)}
    for maps, image in zip(groups, axis.images, strict=True):
        mosaic = np.ma.filled(image.get_array(), np.nan)
        assert np.isfinite(mosaic).sum() == 6 * 30
        for s, sheet in enumerate(SHEETS):  # a column a layer, attention above MLP, one empty cell between
            top, left = s % 2 * 6, s // 2 * 7
            assert np.array_equal(mosaic[top : top + 5, left : left + 6], maps.values[sheet])
    limits = {i.get_clim() for i in drawing.draw_sheets(groups, "", "").axes[0].images}
    everything = np.concatenate([grid.ravel() for maps in groups for grid in maps.values.values()])
    assert limits == {(-(q := np.quantile(np.abs(everything), 0.995)), q)}


def test_each_model_has_its_mean_morans_i_beside_it():
    groups = [some_maps("before", 0), some_maps("after", 1, moran=0.4321)]
    said = [text.get_text() for text in drawing.draw_sheets(groups, "", "").axes[0].texts]
    mean = np.mean([topo.morans_i(grid) for grid in groups[0].values.values()])
    assert (
        f"before: mean Moran's I {mean:.2f}".replace("-", "\u2212") in said
        and "after: mean Moran's I 0.43" in said
    )
    assert [text for text in said if text.startswith("layer")] == ["layer 0", "layer 1", "layer 2"]
    assert some_maps("", 0, moran=-0.001).heading == "mean Moran's I 0.00"
    constant = drawing.Maps("", {"layer.0.mlp": np.ones((4, 4))})
    assert constant.heading == "mean Moran's I 0.00"


@pytest.mark.parametrize("sheets", [["sheet"], ["layer.0.mlp"], [f"layer.{i}.mlp" for i in range(12)]])
def test_any_number_of_sheets_is_drawn(sheets):
    axis = drawing.draw_sheets([some_maps("", 0, sheets)], "", "").axes[0]
    assert np.isfinite(np.ma.filled(axis.images[0].get_array(), np.nan)).sum() == 30 * len(sheets)


def test_what_is_not_outlined_is_faded_and_noise_is_pale():
    maps = some_maps("", 0)
    masks = {sheet: np.zeros((5, 6), bool) for sheet in SHEETS}
    masks["layer.0.attn"][0, 0] = True
    figure = drawing.draw_sheets([maps._replace(outlined=masks)], "t", "", least=9.0)
    (image,) = figure.axes[0].images
    opacity = image.get_alpha()
    assert opacity[0, 0] == 1 and (opacity[:5, :6].ravel()[1:] == drawing.FADED).all()
    assert image.get_clim() == (-9, 9)
    assert drawing.in_words(figure).startswith(f"t. {maps.heading}")


def test_the_palette_is_one_in_figures_terminal_and_page():
    red, green, blue, _ = (np.array(drawing.colours()(0.0)) * 255).round().astype(int)
    assert f"{red};{green};{blue}" == terminal.colour(-1.0) == "10;42;96"
    assert terminal.colour(0.62) == "217;106;30" and terminal.colour(9) == "112;38;4"


def test_progress_is_a_line_every_ten_seconds_in_a_pipe(monkeypatch, capsys):
    now = iter([0.0, *np.arange(0.0, 30, 3)])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(now))
    assert list(terminal.progress(range(10), "reading")) == list(range(10))
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["reading: 4 of 10, ETA 18s", "reading: 8 of 10, ETA 6s"]


def test_an_outline_runs_around_the_cells_of_its_mask():
    mask = np.zeros((4, 5), bool)
    mask[1, 2] = mask[1, 3] = True
    x, y = drawing.outline(mask, top=10, left=20)
    ends = [{(x[k], y[k]), (x[k + 1], y[k + 1])} for k in range(0, len(x), 3)]
    assert len(ends) == 6 and np.isnan(x[2::3]).all()
    around = [{(21.5, 10.5), (22.5, 10.5)}, {(22.5, 10.5), (23.5, 10.5)}, {(21.5, 10.5), (21.5, 11.5)}]
    around += [{(21.5, 11.5), (22.5, 11.5)}, {(22.5, 11.5), (23.5, 11.5)}, {(23.5, 10.5), (23.5, 11.5)}]
    assert all(line in ends for line in around)


def test_a_map_is_standardised_and_a_constant_one_is_0():
    grids = np.stack([np.arange(6.0).reshape(2, 3), np.full((2, 3), 7.0)])
    z = drawing.standardised(grids)
    assert z[0].mean() == pytest.approx(0) and z[0].std() == pytest.approx(1) and (z[1] == 0).all()

import pytest

from cosmos_cli.recipe import loading
from cosmos_cli.train.loop import learning_rate


def of(*pairs):
    return loading.load("nemo_assets", pairs).recipe


@pytest.mark.parametrize("step", [0, 1, 199, 1999])
def test_the_reference_recipe_warms_up_by_the_formula_and_never_arrives(step):
    factor = 1e-6 + (1 - 1e-6) * step / 2500
    assert learning_rate(of(), step) == pytest.approx(2**-14.3 * factor, rel=1e-6)
    assert learning_rate(of("learning_rate=1"), step) == pytest.approx(factor, rel=1e-9)


def test_after_the_warm_up_the_rate_falls_in_a_line_to_its_end():
    r = of("learning_rate=1", "warmup_steps=100", "max_steps=300", "lr_end_factor=0.1")
    assert learning_rate(r, 100) == 1.0
    assert learning_rate(r, 200) == pytest.approx(0.55, rel=1e-9)
    assert learning_rate(r, 300) == pytest.approx(0.1, rel=1e-9)


def test_without_a_warm_up_the_first_step_has_the_full_rate():
    assert learning_rate(of("learning_rate=1", "warmup_steps=0"), 0) == 1.0

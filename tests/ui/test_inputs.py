"""Forms are made from the option fields and read back into the same options."""

import gradio as gr
import pytest

from workbench.options import ACT_BITS, BadInput, Budget, QuantConfig, SearchConfig, SensitivityConfig, TraceConfig
from workbench.ui import inputs


@pytest.mark.parametrize("options", [SensitivityConfig, QuantConfig, SearchConfig])
def test_an_untouched_form_is_the_default_options(options):
    components = inputs.build(options, *options.model_fields)
    assert inputs.read(options, components, [c.value for c in components.values()]) == options()


def test_a_slider_takes_bounds_step_and_help_from_the_field():
    slider = inputs.component(SearchConfig, "beam")
    field = SearchConfig.model_fields["beam"]
    assert isinstance(slider, gr.Slider)
    assert (slider.minimum, slider.maximum, slider.step, slider.value) == (1, 64, 1, field.default)
    assert slider.info == field.description


def test_a_pattern_of_words_becomes_a_choice():
    choice = inputs.component(SensitivityConfig, "estimator")
    assert [value for _, value in choice.choices] == ["adjoint", "local"]


def test_a_wide_range_is_a_number_box():
    assert isinstance(inputs.component(TraceConfig, "seed"), gr.Number)


def test_an_excluded_bound_is_left_out():
    low, high = inputs.bounds(SensitivityConfig, "tau")
    assert 0 < low < 1 and high == 100
    assert inputs.bounds(Budget, "max_mean_act_bits") == (min(ACT_BITS), 16)


def test_whole_numbers_from_a_browser_and_no_group():
    read = inputs.read(QuantConfig, ("group_size", "modulation_bits"), ("none", 8.0))
    assert read.group_size is None and read.modulation_bits == 8


@pytest.mark.parametrize(("options", "name", "value", "said"), [
    (TraceConfig, "steps", 0, "steps"), (TraceConfig, "steps", None, "steps"), (TraceConfig, "steps", 2.5, "steps"),
    (TraceConfig, "steps", "many", "steps"), (TraceConfig, "seed", -1, "seed"), (SearchConfig, "beam", float("nan"), "beam"),
    (SensitivityConfig, "tau", float("inf"), "tau"), (SensitivityConfig, "estimator", "wrong", "estimator"),
    (QuantConfig, "group_size", 48, "group_size"),
])
def test_bad_values_are_one_line_that_names_the_field(options, name, value, said):
    control = inputs.component(options, name)
    with pytest.raises(BadInput) as error:
        inputs.read(options, (name,), (control.preprocess(value),))
    assert said in str(error.value) and "\n" not in str(error.value)

import click
import pytest

from heimdall_onnx.cli.help import ParameterOption
from heimdall_onnx.cli.main import main
from heimdall_onnx.common.parameters import ReleaseParameters
from heimdall_onnx.training.parameters import TrainingParameters


@pytest.mark.parametrize("name", ["release", "demo", "train", "fleet"])
def test_help_shows_what_is_taken_where_a_parameter_is_not_given(name):
    command = main.commands[name]
    options = [option for option in command.params if isinstance(option, ParameterOption)]
    assert {"name", "bucket", "tolerance", "profile"} <= {option.name for option in options}
    for option in options:
        of_training = option.parameters.endswith("TrainingParameters")
        model = TrainingParameters if of_training else ReleaseParameters
        default = model.model_fields[option.name].get_default(call_default_factory=True)
        _, text = option.get_help_record(click.Context(command))
        # Where it is empty, the option's own words may say what that means.
        empty = default in ("", None, {})
        assert (f"[default: {default}]" in text) is not empty, option.name
        assert "Undefined" not in text


def test_help_without_a_default_of_its_own_keeps_what_the_option_says():
    command = main.commands["train"]
    option = next(o for o in command.params if o.name == "checkpoint_dir")
    _, text = option.get_help_record(click.Context(command))
    assert text == "For what is made.  [default: below HEIMDALL_HOME]"

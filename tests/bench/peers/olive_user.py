"""What Olive loads by itself: the captures, and an evaluator by the figures of the task."""

from __future__ import annotations

from typing import Any

import onnxruntime as ort
from olive.data.registry import Registry as DataRegistry
from olive.evaluator.metric_result import MetricResult
from olive.evaluator.olive_evaluator import OnnxEvaluator
from olive.evaluator.registry import Registry
from task import INPUT, OUTPUTS, answers, growth, read


class Captures:
    """Inputs of an ``.npz`` one by one; Olive wants a label beside each, and 0 is none."""

    def __init__(self, path: str) -> None:
        self._inputs, _ = read(path)

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, row: int) -> tuple[dict[str, Any], int]:
        return {INPUT: self._inputs[row]}, 0


@DataRegistry.register_dataset()
def captures(path: str, **_: Any) -> Captures:
    return Captures(path)


@Registry.register("localization")
class LocalizationEvaluator(OnnxEvaluator):
    """Latency as Olive measures it; for accuracy, how much the task's error grows over fp32.

    A metric of the type "custom" would be the usual way, but Olive 0.13.0 can't write one into its
    cache: `Metric.serialize_backend` takes the backend that such a metric has none of.
    """

    def __init__(self, evaluation: str, reference: str, threads: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._inputs, self._truth = read(evaluation)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        session = ort.InferenceSession(reference, options, providers=["CPUExecutionProvider"])
        self._reference = self._answers(session)

    def _evaluate_accuracy(
        self,
        model: Any,
        metric: Any,
        dataloader: Any,
        post_func: Any = None,
        device: Any = None,
        execution_providers: Any = None,
    ) -> MetricResult:
        session = model.prepare_session(
            inference_settings=model.inference_settings,
            device=device,
            execution_providers=execution_providers,
        )
        value = growth(self._reference, self._answers(session), self._truth)
        return MetricResult.model_validate(
            {
                sub.name: {
                    "value": value,
                    "priority": sub.priority,
                    "higher_is_better": sub.higher_is_better,
                }
                for sub in metric.sub_types
            }
        )

    def _answers(self, session: Any) -> dict[str, Any]:
        def run(rows: Any) -> dict[str, Any]:
            return dict(zip(OUTPUTS, session.run(list(OUTPUTS), {INPUT: rows}), strict=True))

        return answers(run, self._inputs)

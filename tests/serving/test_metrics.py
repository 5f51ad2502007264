"""What Prometheus reads of a server: what happened is counted once, and strangers' names make no series."""

from __future__ import annotations

from typing import Any

from generation.adapters_lab import Lab
from generation.engine_lab import numbers
from prometheus_client.parser import text_string_to_metric_families
from serving.host_lab import hosted, played, until

from peftkit.serving import health
from peftkit.serving import metrics as told
from peftkit.serving.metrics import Metrics

PROMPT = numbers(20, 1)


def figures(metrics: Metrics) -> dict[tuple[str, str], float]:
    """Every sample by its name and its labels' values."""
    families = text_string_to_metric_families(metrics.text().decode())
    return {
        (sample.name, ",".join(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }


def test_requests_tokens_and_times_are_counted_by_model_and_end(lab: Lab) -> None:
    async def scene() -> None:
        async with hosted(lab, ["sql", "tickets@latest"]) as stage:
            metrics = Metrics(stage.host)
            for model, finish in (("sql", "stop"), ("sql", "length"), ("base", "cancelled"), ("sql@latest", "stop")):
                watch = metrics.begun(model)
                for _ in range(2):
                    watch.first()
                for _ in range(2):
                    watch.ended(finish, 20, 5)
            never = metrics.begun("tickets@latest")
            never.ended("failed", 20, 0)
            metrics.refused(429)
            found = figures(metrics)
        assert found["peftkit_requests_total", "stop,sql"] == 2
        assert found["peftkit_requests_total", "length,sql"] == 1
        assert found["peftkit_requests_total", "cancelled,base"] == 1
        assert found["peftkit_requests_total", "failed,tickets@latest"] == 1
        assert found["peftkit_prompt_tokens_total", "sql"] == 60
        assert found["peftkit_completion_tokens_total", "sql"] == 15
        assert found["peftkit_first_token_seconds_count", "sql"] == 3
        assert ("peftkit_first_token_seconds_count", "tickets@latest") not in found
        assert found["peftkit_request_seconds_count", "tickets@latest"] == 1
        assert found["peftkit_disconnects_total", ""] == 1
        assert found["peftkit_refused_total", "429"] == 1

    played(scene())


def test_names_that_are_not_served_share_one_label(lab: Lab) -> None:
    async def scene() -> None:
        async with hosted(lab, ["sql"]) as stage:
            metrics = Metrics(stage.host)
            for i in range(50):
                metrics.begun(f"stranger-{i}").ended(f"end-{i}", 1, 1)
                metrics.begun(f"sql@{i:04d}").ended("stop", 1, 1)
            found = figures(metrics)
        assert {labels for name, labels in found if name == "peftkit_requests_total"} == {"stop,sql", "other,other"}

    played(scene())


def test_names_beyond_the_most_that_are_told_apart_share_one_label(lab: Lab, monkeypatch: Any) -> None:
    monkeypatch.setattr(told, "_MOST_LABELS", 2)

    async def scene() -> None:
        async with hosted(lab, ["sql", "tickets", "sql@latest"]) as stage:
            metrics = Metrics(stage.host)
            for model in ("sql", "base", "tickets", "sql@latest", "sql", "base"):
                metrics.begun(model).ended("stop", 1, 1)
            found = figures(metrics)
        counted = {labels: found[name, labels] for name, labels in found if name == "peftkit_requests_total"}
        assert counted == {"stop,sql": 2, "stop,base": 2, "stop,other": 2}

    played(scene())


def test_the_engine_is_asked_when_the_metrics_are_read(lab: Lab) -> None:
    async def scene() -> tuple[dict[Any, float], dict[Any, float]]:
        async with hosted(lab, ["sql"], slots=1) as stage:
            metrics = Metrics(stage.host)
            answer = await stage.begin("sql", PROMPT, 400)
            await anext(answer.pieces())
            during = figures(metrics)
            answer.cancel()
            await answer.whole()
            await stage.host.attach("tickets")
            await stage.ask("tickets", PROMPT, 1)
            lab.lora("sql-next", 1)
            lab.lora("tickets", 400)
            await stage.host.reload()
            await stage.idle()
            # The engine's thread counts after a job, whose asker may go on before that.
            await until(lambda: figures(metrics)["peftkit_adapter_misses_total", ""] >= 3)
            return during, figures(metrics)

    during, after = played(scene())
    names = (
        "running",
        "waiting",
        "resident_adapters",
        "adapter_misses_total",
        "adapter_evictions_total",
        "swaps_total",
    )
    assert [during[f"peftkit_{name}", ""] for name in names] == [1, 0, 1, 1, 0, 0]
    assert after["peftkit_running", ""] == 0
    assert after["peftkit_swaps_total", ""] == 1
    assert after["peftkit_adapter_misses_total", ""] >= 3
    assert after["peftkit_adapter_evictions_total", ""] >= 2
    assert after["peftkit_adapter_miss_seconds_total", ""] > 0
    assert after["peftkit_adapter_bytes", ""] > 0
    assert after["peftkit_models", ""] == 3


def test_health_says_whether_answers_can_be_had(lab: Lab, monkeypatch: Any) -> None:
    async def scene() -> None:
        async with hosted(lab, ["sql"]) as stage:
            get = {route.path: route.endpoint for route in health.routes(stage.host, Metrics(stage.host))}

            async def asked(path: str) -> tuple[int, bytes]:
                response = await get[path](None)
                return response.status_code, response.body

            status, body = await asked("/health")
            assert status == 200
            assert b'"status":"ok","base":"base","fingerprint":"' + stage.host.fingerprint.encode() in body
            assert b"sql" not in body
            assert b"peftkit_running 0.0" in (await asked("/metrics"))[1]
            monkeypatch.setattr(stage.engine._faults, "trouble", "the device is lost")
            status, body = await asked("/health")
            assert (status, b'"status":"trouble"' in body, b"the device is lost" in body) == (503, True, True)
            monkeypatch.undo()
            await stage.host.close()
            status, body = await asked("/health")
            assert (status, b'"status":"draining"' in body) == (503, True)

    played(scene())

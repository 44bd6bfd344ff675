"""Read the config, wire the parts, serve until told to stop.

Boot order, each step before the next: 1 measure and extend RTMR3, which names the GPUs; then they may take work · 2
load the weights, every block against the measured root · 3 self-test and warm-up (the engine's construction does both)
· 4 extend `system-ready` · 5 take boot evidence, begin the log with its EPOCH · 6 listen, and watch the machine.
Anything that fails before 6 ends the process with its code; no port was open. A machine that changes afterwards ends it
too.

The private keys live in this process and in the front end's memory, never on a disk. Not done here: reboot on exit,
which is the init system's on `tdx`.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from countermark.errors import Unavailable
from countermark.formats.evidence import parse_evidence
from countermark.formats.quote import quote_digest
from countermark.formats.records import EXACT_CLAIMS, EXACT_TIER, Stack
from countermark.formats.report_data import Purpose
from countermark.tlog.merkle import EMPTY_ROOT
from countermark_appliance.config import Config, format_address, load_config
from countermark_appliance.connections import Connections
from countermark_appliance.engine import weights
from countermark_appliance.engine.engine import Engine, EngineInfo
from countermark_appliance.frontend import FrontEnd, forbid_core_dumps
from countermark_appliance.operations import logs
from countermark_appliance.operations.quotas import Quotas
from countermark_appliance.operations.watching import Operations
from countermark_appliance.platform.attester import Attester, LogHead, boot_values, extend_boot, extend_ready
from countermark_appliance.platform.base import Platform, open_platform
from countermark_appliance.platform.keyring import Keyring
from countermark_appliance.records.anchors import Anchors, Calendars, Submitter, TimeStamps
from countermark_appliance.records.recorder import Recorder, log_origin
from countermark_appliance.service import Service, ServiceLimits
from countermark_appliance.watch import Watch
from countermark_kernels import PROFILE, kernel_digest

NO_NONCE = bytes(32)  # nobody asked for the passport, and it claims no freshness
RECORDING = 64
# On hardware: Linux asks for one quote at a time, and looks once a second whether the host has answered (tdx-guest.c,
# wait_for_quote_completion). Ten may wait, as many seconds of a client's patience; the next is told to come back.
QUOTES_PER_S = 1.0
QUOTES_WAITING = 10
CERTIFICATE_VALID_S = 366 * 86_400  # a name for tooling; what authenticates the key is the quote
_log = logging.getLogger(__name__)


def serve(config_path: Path, *, ready: Callable[[dict[str, Any]], None]) -> None:
    """Boot and serve until SIGTERM or SIGINT. `ready` gets the public facts once the port is open.

    Raises `ConfigError`, `WeightsError`, `LogError`, `VerificationError` or `Unavailable` when the boot fails, and
    `Unavailable` (`frontend.exit`, `engine.failed`) when the front end or the engine ends on its own, and what
    `Platform.check_unchanged` raised when the machine changed.
    """
    forbid_core_dumps()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    config = load_config(config_path)
    logs.reform(config.telemetry_logs)
    platform = open_platform(config)
    if platform.name.simulated:
        _log.warning("platform %s: SIMULATED, no confidential hardware", platform.name.value)
    keyring = Keyring()
    boot = boot_values(
        platform,
        keyring,
        config=config.digest,
        weights_root=config.weights_root,
        profile=PROFILE,
        kernel_digest=kernel_digest(),
    )
    extend_boot(platform, boot)
    platform.admit_gpus()
    _log.info("weights: checking every block in %s", config.weights_dir)
    artefact = weights.load(config.weights_dir, expected_root=config.weights_root)
    _log.info("engine: loading, self-test")
    engine = Engine(
        artefact,
        threads=config.threads,
        device=config.device,
        max_sequences=config.max_sequences,
        max_waiting=config.max_waiting,
        on_failure=stop.set,
    )
    _log.info("engine: %s, profile %s, backend %s", engine.info.model, engine.info.profile, engine.info.backend)
    with ExitStack() as opened:  # what was opened last closes first
        opened.callback(engine.close)
        extend_ready(platform, boot)
        attester = Attester(platform, keyring, boot)
        empty = LogHead(origin=log_origin(config.operator, keyring.boot_id), size=0, root=EMPTY_ROOT)
        passport = attester.attest(purpose=Purpose.PASSPORT, nonce=NO_NONCE, exporter=None, log=empty)
        recorder = Recorder.open(
            config.log_dir,
            operator=config.operator,
            keyring=keyring,
            evidence_digest=quote_digest(parse_evidence(passport).quote),
            stack=_stack(config, platform, engine.info),
            deployer_id=config.deployer_id,
            retention_until=config.retention_until,
            operator_dir=config.log_operator_dir,
        )
        opened.callback(recorder.close)
        facts = {
            "simulated": platform.name.simulated,
            "model": engine.info.model,
            "profile": engine.info.profile,
            "backend": engine.info.backend,
            "image_id": platform.image_id.hex(),
            "weights_root": config.weights_root.hex(),
            "boot_id": keyring.boot_id.hex(),
        }
        limits = _limits(config, simulated=platform.name.simulated)
        operations = opened.enter_context(_operations(config, facts, recorder))
        service, connections = _service(limits, attester, passport, engine, recorder, operations)
        certificate = keyring.tls_certificate(
            attester.passport(parse_evidence(passport)),
            now=int(time.time()),
            valid_s=CERTIFICATE_VALID_S,
            simulated=platform.name.simulated,
        )
        front_end = FrontEnd.start(
            host=config.listen_host,
            port=config.listen_port,
            private_key=keyring.tls.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
            certificate=certificate,
            upstream_port=service.start(),
            connections=connections,
            on_exit=stop.set,
        )
        opened.callback(front_end.close)
        watch = Watch(platform, on_change=stop.set)
        opened.callback(watch.close)
        watch.start()
        anchors = _anchors(config, recorder)
        opened.callback(anchors.close)
        anchors.start()
        service.set_serving()
        ready({"listening": format_address(config.listen_host, front_end.port), **facts})
        stop.wait()
        if watch.found is not None:
            service.stop(grace_s=0.0)  # nothing is finished on a machine that is not the one measured
            raise watch.found
        if not front_end.is_alive():
            raise Unavailable("front end: the process ended", code="frontend.exit")
        _log.info("stopping: no new requests; those that run may finish")
        front_end.drain()
        service.stop()
        if engine.failed:
            raise Unavailable("engine: its thread ended by a fault", code="engine.failed")


@contextmanager
def _operations(config: Config, facts: Mapping[str, object], recorder: Recorder) -> Iterator[Operations]:
    """What the configuration asks for, and nothing of it loaded otherwise."""
    with ExitStack() as opened:
        named = {name: str(value) for name, value in facts.items()}
        metrics, traces = None, None
        if config.telemetry_metrics is not None:
            from countermark_appliance.operations.metrics import Metrics, MetricsPort  # noqa: PLC0415

            metrics = Metrics()
            metrics.describe(named)
            metrics.gauge("countermark_log_leaves", "Records of this boot", lambda: float(recorder.head()[0]))
            port = MetricsPort.open(metrics, *config.telemetry_metrics)
            opened.callback(port.close)
            _log.info("metrics: http://%s/metrics", format_address(config.telemetry_metrics[0], port.port))
        if config.telemetry_otlp_url is not None:
            from countermark_appliance.operations.traces import Traces  # noqa: PLC0415

            traces = Traces.to(config.telemetry_otlp_url, named)
            opened.callback(traces.close)
        yield Operations(quotas=Quotas(config.keys), metrics=metrics, traces=traces)


def _service(
    limits: ServiceLimits,
    attester: Attester,
    passport: bytes,
    engine: Engine,
    recorder: Recorder,
    operations: Operations,
) -> tuple[Service, Connections]:
    connections = Connections()
    service = Service(
        attester=attester,
        recorder=recorder,
        engine=engine,
        connections=connections,
        passport=passport,
        limits=limits,
        operations=operations,
    )
    return service, connections


def _anchors(config: Config, recorder: Recorder) -> Anchors:
    submitters: list[Submitter] = []
    if config.anchors_tsa is not None:
        submitters.append(TimeStamps(config.anchors_tsa))
    if config.anchors_calendars:
        submitters.append(Calendars(config.anchors_calendars))
    own = config.log_dir / recorder.epoch.boot_id.hex()
    return Anchors(own, recorder.checkpoint, submitters, every_s=config.anchors_every_s)


def _limits(config: Config, *, simulated: bool) -> ServiceLimits:
    # More than the engine has places for: answers that have ended and wait for their records.
    generations = config.max_sequences + config.max_waiting + RECORDING
    if simulated:
        return ServiceLimits(generations=generations)
    return ServiceLimits(generations=generations, attests_per_s=QUOTES_PER_S, attest_burst=QUOTES_WAITING)


def _stack(config: Config, platform: Platform, info: EngineInfo) -> Stack:
    """What every INTENT of this boot says of the node. GPU fields are empty where the engine computes on the CPU."""
    return Stack(
        platform=platform.name.value,
        image_id=platform.image_id,
        config_digest=config.digest,
        model=info.model,
        weights_root=info.weights_root,
        manifest_digest=info.manifest_digest,
        quantisation=info.quantisation,
        adapters=(),
        tokenizer_digest=info.tokenizer_digest,
        chat_template_digest=info.template_digest,
        profile=info.profile,
        kernel_digest=info.kernel_digest,
        engine=info.engine_version,
        backend=info.backend,
        torch=info.torch_version,
        triton=info.triton_version,
        cuda=info.cuda_version,
        driver=info.driver_version,
        vbios=platform.vbios,
        gpus=info.gpus,
        cpu=info.cpu_model,
        determinism=EXACT_TIER,
        claims=EXACT_CLAIMS,
    )

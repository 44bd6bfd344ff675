"""Scope `genuine`: raw evidence files of real machines, judged as far as files were given.

The steps are those of `appraise` (1 to 4 for a TD, 6 for its event logs, 8 for GPUs) and run the same functions. There
is no connection and no claim of ours to bind, so the result is a value of its own, never a Verdict: nothing is sent on
it. Every step that can run runs, also after one that failed, because an auditor wants all that is wrong. The first
failing check in the order of steps gives the result its code; it is `reject` when anything was found wrong, else
`undecidable` when something required is missing, else `accept`. A step for which no file was given is SKIP and says so,
and `accept` is then about the files that were given.

Not checked here: measurements of the TD against reference values, report_data, RTMR3's grammar, how many GPUs there
are, whether a machine is on an allow-list, weights and channel: all of these need more than files (`appraise`).
"""

from countermark.genuine.gpu import GpuFiles, appraise_gpu_bundle, appraise_gpu_files
from countermark.genuine.result import FileAppraisal, Outcome, hex_or_binary
from countermark.genuine.tdx import appraise_event_log_files, appraise_tdx_files

__all__ = [
    "FileAppraisal",
    "GpuFiles",
    "Outcome",
    "appraise_event_log_files",
    "appraise_gpu_bundle",
    "appraise_gpu_files",
    "appraise_tdx_files",
    "hex_or_binary",
]

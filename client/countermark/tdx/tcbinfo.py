"""TCB info version 3 and QE identity version 2 as values: what Intel's signed JSON says, before anything is compared.

Intel PCS API version 4, "Get TDX TCB Info" and "Get Quoting Enclave Identity (TDX)"; binary fields are hex of either
case, `miscselect` and the attributes in the byte order of the report. Levels are put in Intel's order, the newest
first, whatever their order in the document (QVL: by SGX components, PCE SVN, TDX components). Unknown members are
tolerated, as in every vendor's signed document; what is read must be there and have its exact size.
Not checked here: signatures and dates (`tdx.endorsements`), and whether a status is one we know (`tdx.tcb`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from countermark.errors import FormatError

COMPONENTS: Final = 16
_MAX_LEVELS: Final = 256
_MAX_IDENTITIES: Final = 64
_MAX_ADVISORIES: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class TcbLevel:
    """One rating: a machine has it when none of its SVNs is below. `status` is Intel's word for it."""

    sgx: tuple[int, ...]  # 16 component SVNs, as in the PCK certificate
    pce_svn: int
    tdx: tuple[int, ...]  # 16 component SVNs, as in TEE_TCB_SVN
    status: str
    advisories: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SvnLevel:
    """One rating of a TDX module or quoting enclave, which have a single SVN."""

    isv_svn: int
    status: str
    advisories: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleIdentity:
    """A TDX module as Intel knows it; `levels` is empty for the unversioned one, which the platform's levels rate."""

    name: str  # such as TDX_01, upper case; empty for the unversioned one
    mrsigner: bytes  # 48
    attributes: bytes  # 8
    levels: tuple[SvnLevel, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TcbInfo:
    """What Intel says about machines of one family; levels from the newest to the oldest."""

    fmspc: bytes  # 6
    pce_id: bytes  # 2
    module: ModuleIdentity
    modules: tuple[ModuleIdentity, ...]
    levels: tuple[TcbLevel, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class QeIdentity:
    """The quoting enclave as Intel knows it; levels from the newest to the oldest."""

    misc_select: int
    misc_select_mask: int
    attributes: bytes  # 16
    attributes_mask: bytes  # 16
    mrsigner: bytes  # 32
    isv_prod_id: int
    levels: tuple[SvnLevel, ...]


def bad(message: str) -> FormatError:
    """What every member of the wrong form is refused with."""
    return FormatError(f"endorsements.{message}", code="endorsements.malformed", step="1")


def integer(values: Mapping[str, Any], name: str, what: str, *, most: int, least: int = 0) -> int:
    """A whole number within its range. Raises `FormatError` `endorsements.malformed`."""
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise bad(f"{what}.{name}: expected {least} to {most}, got {value!r:.40}")
    return value


def moment(values: Mapping[str, Any], name: str, what: str) -> int:
    """An RFC 3339 time in unix seconds. Raises `FormatError` `endorsements.malformed`."""
    value = values.get(name)
    try:
        parsed = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        parsed = None
    if parsed is None or parsed.tzinfo is None:
        raise bad(f"{what}.{name}: expected an RFC 3339 time, got {value!r:.40}")
    return int(parsed.timestamp())


def parse_tcb_info(body: Mapping[str, Any]) -> TcbInfo:
    """Read the members of a TDX TCB info. Raises `FormatError` `endorsements.malformed`."""
    what = "tcb_info"
    integer(body, "version", what, least=3, most=3)
    integer(body, "tcbType", what, most=0)
    levels = []
    for item, at in _items(body, "tcbLevels", what, least=1, most=_MAX_LEVELS):
        tcb = _object(item, "tcb", at)
        moment(item, "tcbDate", at)
        levels.append(
            TcbLevel(
                sgx=_components(tcb, "sgxtcbcomponents", at),
                pce_svn=integer(tcb, "pcesvn", at, most=0xFFFF),
                tdx=_components(tcb, "tdxtcbcomponents", at),
                status=_status(item, at),
                advisories=_advisories(item, at),
            )
        )
    modules = []
    for item, at in _items(body, "tdxModuleIdentities", what, least=0, most=_MAX_IDENTITIES):
        modules.append(_module(item, at, name=_text(item, "id", at).upper(), levels=_svn_levels(item, at, most=0xFF)))
    if len({module.name for module in modules}) != len(modules):
        raise bad(f"{what}.tdxModuleIdentities: expected each id once")
    return TcbInfo(
        fmspc=_hex(body, "fmspc", what, 6),
        pce_id=_hex(body, "pceId", what, 2),
        module=_module(_object(body, "tdxModule", what), f"{what}.tdxModule", name="", levels=()),
        modules=tuple(modules),
        levels=tuple(sorted(levels, key=lambda level: (level.sgx, level.pce_svn, level.tdx), reverse=True)),
    )


def parse_qe_identity(body: Mapping[str, Any]) -> QeIdentity:
    """Read the members of a TDX QE identity. Raises `FormatError` `endorsements.malformed`."""
    what = "qe_identity"
    integer(body, "version", what, least=2, most=2)
    return QeIdentity(
        misc_select=int.from_bytes(_hex(body, "miscselect", what, 4), "little"),
        misc_select_mask=int.from_bytes(_hex(body, "miscselectMask", what, 4), "little"),
        attributes=_hex(body, "attributes", what, 16),
        attributes_mask=_hex(body, "attributesMask", what, 16),
        mrsigner=_hex(body, "mrsigner", what, 32),
        isv_prod_id=integer(body, "isvprodid", what, most=0xFFFF),
        levels=_svn_levels(body, what, most=0xFFFF),
    )


def _module(item: Mapping[str, Any], what: str, *, name: str, levels: tuple[SvnLevel, ...]) -> ModuleIdentity:
    _hex(item, "attributesMask", what, 8)  # QVL has no use for it: every attribute of a module must be zero
    return ModuleIdentity(
        name=name,
        mrsigner=_hex(item, "mrsigner", what, 48),
        attributes=_hex(item, "attributes", what, 8),
        levels=levels,
    )


def _svn_levels(body: Mapping[str, Any], what: str, *, most: int) -> tuple[SvnLevel, ...]:
    levels = []
    for item, at in _items(body, "tcbLevels", what, least=1, most=_MAX_LEVELS):
        moment(item, "tcbDate", at)
        svn = integer(_object(item, "tcb", at), "isvsvn", at, most=most)
        levels.append(SvnLevel(isv_svn=svn, status=_status(item, at), advisories=_advisories(item, at)))
    return tuple(sorted(levels, key=lambda level: level.isv_svn, reverse=True))


def _items(
    values: Mapping[str, Any], name: str, what: str, *, least: int, most: int
) -> list[tuple[Mapping[str, Any], str]]:
    items = values.get(name, [])
    if not isinstance(items, list) or not least <= len(items) <= most:
        raise bad(f"{what}.{name}: expected a list of {least} to {most}")
    for item in items:
        if not isinstance(item, dict):
            raise bad(f"{what}.{name}: expected objects, got {type(item).__name__}")
    return [(item, f"{what}.{name}[{index}]") for index, item in enumerate(items)]


def _object(values: Mapping[str, Any], name: str, what: str) -> Mapping[str, Any]:
    value = values.get(name)
    if not isinstance(value, dict):
        raise bad(f"{what}.{name}: expected an object, got {type(value).__name__}")
    return value


def _text(values: Mapping[str, Any], name: str, what: str) -> str:
    value = values.get(name)
    if not isinstance(value, str) or not value.isascii() or not value.isprintable() or not 0 < len(value) <= 64:
        raise bad(f"{what}.{name}: expected a short text, got {value!r:.40}")
    return value


def _status(level: Mapping[str, Any], what: str) -> str:
    return _text(level, "tcbStatus", what)


def _advisories(level: Mapping[str, Any], what: str) -> tuple[str, ...]:
    items = level.get("advisoryIDs", [])
    if not isinstance(items, list) or len(items) > _MAX_ADVISORIES:
        raise bad(f"{what}.advisoryIDs: expected a list of at most {_MAX_ADVISORIES}")
    return tuple(_text({"advisoryIDs": item}, "advisoryIDs", what) for item in items)


def _components(tcb: Mapping[str, Any], name: str, what: str) -> tuple[int, ...]:
    items = _items(tcb, name, what, least=COMPONENTS, most=COMPONENTS)
    return tuple(integer(item, "svn", at, most=0xFF) for item, at in items)


def _hex(values: Mapping[str, Any], name: str, what: str, size: int) -> bytes:
    value = values.get(name)
    try:
        data = bytes.fromhex(value) if isinstance(value, str) and len(value) == 2 * size else b""
    except ValueError:
        data = b""
    if len(data) != size:
        raise bad(f"{what}.{name}: expected {size} bytes in hex, got {value!r:.40}")
    return data

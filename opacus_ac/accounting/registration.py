"""Registration of the accountants with Opacus. It is explicit, never a side effect of an import."""

from __future__ import annotations

from opacus.accountants import create_accountant, register_accountant

from opacus_ac.accounting.pld_accountant import VariableRatePLDAccountant
from opacus_ac.accounting.pure_accountant import PureDPAccountant
from opacus_ac.accounting.rdp_accountant import VariableRateRDPAccountant


def register() -> None:
    """Make "vrdp", "vpld" and "pure" known to Opacus's ``create_accountant``; calling it again changes nothing.

    Raises:
        ValueError: If another class already has one of these names.
    """
    for accountant in (VariableRateRDPAccountant, VariableRatePLDAccountant, PureDPAccountant):
        name = accountant.mechanism()
        try:
            known = type(create_accountant(name))
        except ValueError:
            known = None
        if known is not accountant:
            register_accountant(name, accountant)

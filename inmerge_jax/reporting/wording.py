"""Former place of `signed`, kept until nothing imports it from here."""

from inmerge_jax.reporting.formatting import signed as signed

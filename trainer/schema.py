"""What every table of the trainer's database is made of."""

from __future__ import annotations

from sqlalchemy import MetaData
from sqlalchemy import String as AnyString

metadata = MetaData()
# Names sort by their bytes everywhere, not by the language that a PostgreSQL was set up for.
String = AnyString().with_variant(AnyString(collation="C"), "postgresql")

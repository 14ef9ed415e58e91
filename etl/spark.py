"""The Spark session of `python -m jobs.X`: same settings file as spark-submit, a Java that works,
this Python everywhere.

Spark file, as `etl/prepare.py` and `indexing/join.py` are.
"""

import os
import sys
from pathlib import Path

from pyspark.sql import SparkSession

from etl.java import find_java_home

CONF_FOLDER = Path(__file__).resolve().parents[1]


def spark_session(app_name: str) -> SparkSession:
    """The running session (spark-submit, a notebook), or a new one set up by the repository's
    `spark-defaults.conf`.

    Raises:
        JavaError: no usable Java.
    """
    if SparkSession.getActiveSession() is None:
        os.environ.setdefault("JAVA_HOME", find_java_home())
        os.environ.setdefault("SPARK_CONF_DIR", str(CONF_FOLDER))
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    return SparkSession.Builder().appName(app_name).getOrCreate()

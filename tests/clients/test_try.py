import subprocess, sys
from .conftest import *
from pathlib import Path
import time
def test_x(shop):
    Path("/tmp/clients4/shop.url").write_text(shop.url)
    while Path("/tmp/clients4/shop.url").exists(): time.sleep(0.3)

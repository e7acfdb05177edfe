"""The hosts: where SSR is switched on, one file each. An unfit DeepSpeed is refused here, before they import it."""

import deepspeed

from ssr_deepspeed.versions import check_host

check_host(deepspeed.__version__)

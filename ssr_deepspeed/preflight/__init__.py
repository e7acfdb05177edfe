"""What must hold on every rank before a long run begins, checked by the command `ssr-preflight`."""

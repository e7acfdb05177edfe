"""The hosts: where SSR is switched on, one file each."""

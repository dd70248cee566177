"""The exchange of memory layers between four hosts of two ranks: `bash tests/network.sh`.

cases.py        the layouts, and the sizes of what is sent
hosts.py        the hosts: network namespaces on one bridge, whose links are shaped
prediction.py   bytes and seconds of an exchange, from the layout and the rates of the links
ranks.py        what every rank runs: measures the links, then the layouts
training.py     trains through Megatron's loop over the hosts
report.py       the table and the plot
"""

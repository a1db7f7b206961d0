"""Load and routing history shared between gateways: who counts what, how it travels, who meets where."""

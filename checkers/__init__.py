"""Is it right? What rewards.py asks.

answers, expressions, spelling      math: what an answer says, is worth, how it is spelt
sandbox, judge, confine, wire       programs: run against their tests, whatever they try
"""

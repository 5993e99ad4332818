"""Job + model + budget + machine -> Plan: what will be claimed, moved and waited for, before anything is loaded.

Every large buffer is a named claim, made here and taken by the stages under the same name. What the networks
allocate besides comes from running their own code on meta tensors (`lowvram.footprint`).

    plan      the nouns: Plan, StagePlan, Lean
    facts     what does not depend on the budget
    visits    the blocks of a network and the order in which a job visits them
    text, prepare, decode    one stage each; encode plans part of one
    ways      how the forward may run, and what each way claims
    denoise   the stage: the fastest way that fits, and its blocks in their places
    choose    `make_plan`: the most that fits
    refuse    what does not fit: the true minimum, and the nearest settings that fit
    words     a choice and an advice
"""

"""How common words are in texts of research: in how many of DOCUMENTS texts a stem (common.text.stems) occurs.

A synthesis has some twenty chunks, too few to tell a common word ("participants") from a telling one. The counts are of
the shipped corpus, in steps above 20; a stem that is not here occurs in none to two of its texts. It need not follow the
corpus: thresholds in config/checks.yaml were chosen with this table.
"""

from __future__ import annotations

DOCUMENTS = 272
_BY_COUNT = {
    120: "author experi replic",
    100: "analys partic report",
    80: "differ result",
    60: "collea later many meta one origin small test two",
    55: "contro sample suppor task",
    50: "found large",
    45: "averag behavi compar conclu labora prereg",
    40: "claim critic failed first group public self studen",
    35: "bia data explai measur perfor predic produc review showed size social sugges tested",
    30: (
        "accoun agains among answer articl better change direct follow gave genera interv larger less little make may "
        "primin psycho publis questi respon signif time used withou zero"
    ),
    25: (
        "across althou appear asked became choice cognit condit contra correc deplet earlie estima high includ model "
        "modera often outcom point practi proced regist repeat reprod select set severa strong three word"
    ),
    20: (
        "adjust adult argued associ belief commen comple correl decisi defend depend descri ego either even examin "
        "expect failur feelin hypoth influe litera made mean memory method percen positi power presen projec real "
        "reanal resear score second smalle standa statis theory"
    ),
    19: "attent benefi combin disput indepe null number patter remain school stereo weak well",
    18: "false increa leave scepti succes team threat value",
    17: "abilit accept achiev four improv limite longer obtain prefer reduce short wherea",
    16: "believ collec confir delay demons gain intell interp lab low open person since still though",
    15: (
        "affect analyt concep consid design far feedba implic indivi judged posing random rate replie reply streng "
        "testin"
    ),
    14: (
        "case consis demand diffic effort journa judgme materi multi overal pose proces reason recall relate reliab "
        "risk sign theref way year"
    ),
    13: (
        "age cannot close concer explan favour few hard help identi inform likely lower manipu matter might nine "
        "object observ physic propos protoc rating readin requir robust rule said salien synthe system taken varied "
        "view women"
    ),
    12: (
        "americ attrib claime event give growth mathem negati online part postur proble remind scale scienc simila "
        "single themse toward video"
    ),
    11: (
        "anchor assign attitu best childr contex countr cultur econom gender held hold learni left link mindse nation "
        "new opposi read receiv relati separa six state thousa traini use variat widely"
    ),
    10: (
        "act advant almost argue attemp bargh classi counte decade detail early error expans game goal half itself "
        "knowle lead least like marshm mechan motiva mouth nearly peer phenom raised rated reache regard remove "
        "resour reveal settin simple togeth univer using versio whose workin"
    ),
    9: (
        "academ access anothe applie carrie debate disagr five free given good gratif hand idea instru invest kind "
        "learne main memori men mental money moral must near none nothin offere possib prime quanti ran reflec regula "
        "rememb role sensit senten serie situat specia story ten term trial unpubl unscra verbal weaker yet young"
    ),
    8: (
        "absenc accord adoles advanc again alone alread amount argume assump backgr body called came centra cited "
        "comput conseq contai cost covere death declin educat emotio equal ethnic extend facial featur flexib gap "
        "grade harm incent judgem leadin led long loss manage market merely mind modest mortal moved neithe plan "
        "pooled prior probab reader record scient see shift showin skill stroop survey taking textbo thu told topic "
        "united usual week within worked"
    ),
    7: (
        "appare automa away behind beyond biling brain challe closel come common contes contin cuddy develo domain "
        "evalua exampl exclud field freque hormon inhibi intera invent issue justif list listen longit losse mainta "
        "minute mood mostly need neutra older ordina outsid paradi past pay pen poor popula price qualit raise recomm "
        "side site somewh stanfo statem studie tenden terror theori thing thinki treat turned variab violen voh "
        "waitin willin willpo"
    ),
    6: (
        "advoca arbitr aversi bayesi brough cautio cleanl clear cleare cohere collab compre constr defenc deserv drew "
        "essay explic fact fail fewer fixed form full functi future genero genuin glucos happen hot human hundre "
        "imitat implan inflat kahnem letter level looked lost matchi met noted offer old pointe propon prospe re "
        "reject rest revers revisi room run sessio simon slight soon stand suppli tax tversk twenty uncert valuat "
        "visibl warmth went wordin worse"
    ),
    5: (
        "action admiss advice al alter ambigu apart ask asking baumei built cartoo causal cause cesari chance charac "
        "childh cleans clearl coeffi colour confid core criter cue curren day degree depart detect disapp discri "
        "discus dismis displa distin docume easily eight emerge establ et every exactl exagge execut exist existe "
        "expert extens face factor failin family fatigu fell fiftee flanke grew hardly harri hidden import indica "
        "instea interf judge kept langua lesson linked lowere macbet meanin middle missin moving narrow never non "
        "option paper pashle persis place play powere precog presch press progra promot protec put regres reward "
        "roughl seeing seen share shown signal spread stimul strack suppos surpri treate typica van vanish versu "
        "washin weigh weight wide worldv"
    ),
    4: (
        "able absent add additi aggres arise around assess attain based basi basic below bem black blood bodily "
        "broade bystan carney chosen cleani confli confou consci consum contac cortis court cover coveri cross curve "
        "defaul deny distor donnel doubt duncan dweck effect elemen eleven empiri end enhanc eviden exchan exerti "
        "explor expres faded famili faster felt final financ fit fragil framin fuel gamble gather gestur greatl "
        "handli health helped higher honest incide inclus inconc induce infant infer insigh insuff intend intere "
        "interr introd item keep knew lacked limit listed loftu logic loneli look mall matche medium member mislea "
        "monoli morali move multil nature neonat nevert newer next nonver now overlo overst parent partia partly "
        "paymen percei photog phrase player policy poorly precis prosoc puzzle quarte raw reacti recent recogn recove "
        "repeti restri retent retrac retrie retroa right risky rohrer rose schmei search settle shalev shared smile "
        "smilin sound spatia stated stress struct style subgro substa sugar summar suscep target taught teachi tended "
        "testos theore thirte took top traine trait transf tried truth type unawar unders unreli unsuit update varian "
        "vary visual volunt warm warnin watt weaken willia wipe wish wrote"
    ),
    3: (
        "above accomp accura acting activa active added advise africa aged agreem allow altern ambady anders antici "
        "anyone anythi archiv arrive asian asymme attrac availa avoid aware awaren back bathin become before behave "
        "biased brief bring calcul call camera camere camp car care carry centur certai changi cheap child chocol "
        "choose choosi chose clean cluste coding colleg commit compan compat compet conced connec contri conven "
        "course create credé crime crisi cup custom decide decrea delive deviat devote diagno discov dispos distan "
        "distra distri domina doubte down draw dunnin easy editor elabor elderl electr ended endors englis enviro "
        "equall equiva exclus existi exposu extrem fabric facili famou fast feel film flat fluid focuse foreca fundam "
        "girl grant greate greenw grow guard guide guided harder harshe helpin hetero histor hit holdin hoolig hostil "
        "illust imagin immedi immora implie impres incons index infere integr job key kruger lack largel larges late "
        "let life line lip loom making maniad math metaph milgra mische mock muscle music named natura networ norm "
        "note notice nudge nudgin obedie operat optimi overes overla oversh overtu pad pair per percep persev pittin "
        "placeb pleasa politi poorer poser post potent powerf praise pre prepar pressu princi prison profes promis "
        "proof propor protru prove provid psi pupil purpos pursui quan quote race range rank rarely rather recons "
        "refere releva religi removi return revise rise robber routin ryan sampli satisf saw scarce schnal scored "
        "seek seemed sense sensib sequen severi shaped shaw shifte shih shrank simmon simons simula slow slower "
        "slowly slumpi soccer societ solvin someth spacin specif speed spence stake starti stop strang subjec subseq "
        "succee sunk suppre surviv sweete switch take teache tellin therap third thresh timing tiny tolera tongue "
        "transc treatm turn twelve underm unlike vadill valid verdic victim walked watche wester white wider witnes "
        "world worrie writer yap yield yielde younge zimbar"
    ),
}
COUNTS = {stem: count for count, stems in _BY_COUNT.items() for stem in stems.split()}
